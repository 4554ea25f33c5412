"""Product-key memory against NumPy, which scores every row: values, gradients, the search alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import ProductKeyConfig
from engram_jax.layers.product_keys import ProductKeys, locate, search
from tests.layers.filled import filled
from tests.oracle import product_keys as oracle

EPS, D, STREAMS = 1e-6, 12, 3


def module(config, dtype="float64"):
    def create():
        return ProductKeys(
            D,
            config,
            norm_eps=EPS,
            init_std=0.02,
            dtype=dtype,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )

    return filled(create)


@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_values_and_gradients_equal_numpy(expansion):
    config = ProductKeyConfig(
        layers=(0,), sub_keys=8, key_dim=6, heads=2, top_k=3, dim=5, expansion=expansion
    )
    rng = np.random.default_rng(expansion)
    streams, g_y = rng.normal(size=(2, 7, STREAMS, D)), rng.normal(size=(2, 7, D))
    with jax.enable_x64(True):
        graphdef, params = nnx.split(module(config))
        params = nnx.to_pure_dict(params)

        def total(params, streams):
            y = nnx.merge(graphdef, params)(streams)
            return jnp.sum(y * g_y), y

        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, y), (g_params, g_streams) = run(params, jnp.asarray(streams))
        given = {k: np.asarray(v["gain"] if k == "query_norm" else v) for k, v in params.items()}
        found = {k: np.asarray(v["gain"] if k == "query_norm" else v) for k, v in g_params.items()}
        assert found["values"].shape == (64 // expansion, 5)
        assert found["value_proj"].shape == (expansion, 5, D)
    sums = dict.fromkeys(found, 0.0)
    for b in range(2):
        expected, grads = oracle.forward_backward(
            streams[b], given, g_y[b], heads=2, top_k=3, eps=EPS
        )
        np.testing.assert_allclose(y[b], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(g_streams[b], grads["streams"], rtol=1e-9, atol=1e-12)
        sums = {k: sums[k] + grads[k] for k in sums}
    for name, expected in sums.items():
        assert np.any(expected), name
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("keys", "expansion"), [(4, 1), (6, 2), (9, 3), (16, 4), (6, 6), (4, 4)])
def test_virtual_rows_are_spread_over_the_blocks(keys, expansion):
    first, second = np.meshgrid(np.arange(keys), np.arange(keys), indexing="ij")
    block, row = (np.asarray(x) for x in locate(first, second, keys, expansion))
    for i in range(keys):
        for j in range(keys):
            assert (block[i, j], row[i, j]) == oracle.location(i, j, keys, expansion)
    places = set(zip(block.ravel().tolist(), row.ravel().tolist(), strict=True))
    stored = keys**2 // expansion
    assert places == {(e, r) for e in range(expansion) for r in range(stored)}
    for e in range(expansion):  # every sub-key of either half, as often in every block
        assert set(np.bincount(first[block == e], minlength=keys)) == {keys // expansion}
        assert set(np.bincount(second[block == e], minlength=keys)) == {keys // expansion}
    for r in range(stored):  # rows of the same values share no sub-key
        assert len(set(first[row == r])) == expansion
        if expansion**2 <= keys:
            assert len(set(second[row == r])) == expansion
    if expansion == 1:
        np.testing.assert_array_equal(row, first * keys + second)


def test_masked_streams_and_other_tokens_do_not_matter():
    """A function of the token's own hidden state: what makes decoding need no state."""
    config = ProductKeyConfig(layers=(0,), sub_keys=8, key_dim=6, heads=2, top_k=3, dim=5)
    own = module(config, "float32")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, STREAMS, D)), jnp.float32)
    whole = own(x)
    for t in range(6):
        np.testing.assert_allclose(own(x[:, t : t + 1])[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)


def test_scores_are_float32_where_the_network_is_bfloat16():
    query = jnp.ones((1, 1, 2, 4), jnp.bfloat16)
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5, 2)), jnp.float32)
    assert search(query, keys, 2)[0].dtype == jnp.float32


def test_what_it_starts_from():
    """Sub-keys uniform within 1 / sqrt(their width), values of variance 1 / dim: the paper's."""
    config = ProductKeyConfig(sub_keys=64, key_dim=16, heads=4, top_k=8, dim=32)
    how = {"norm_eps": EPS, "init_std": 0.02, "dtype": "float32", "param_dtype": "float32"}
    memory = ProductKeys(D, config, **how, rngs=nnx.Rngs(0))
    sub_keys, bound = np.abs(memory.sub_keys[...]), 1 / np.sqrt(16 / 2)
    assert 0.99 * bound < sub_keys.max() <= bound
    np.testing.assert_allclose(sub_keys.mean(), bound / 2, rtol=0.02)
    np.testing.assert_allclose(np.std(memory.values[...]), 1 / np.sqrt(32), rtol=0.01)
