"""F-gram embeddings against NumPy: values, gradients, and the spare row, which none reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.addressing.fgrams import FgramAddressing, find
from engram_jax.addressing.hash_numpy import lookback
from engram_jax.layers.fgram_embedding import FgramEmbedding
from engram_jax.memory.table import TableLayout, init_table
from tests.oracle import fgrams as oracle

D_MEM, D, STREAMS, VOCAB = 6, 5, 3, 4
LAYER = FgramAddressing(
    0,
    (2, 3),
    5,
    (
        np.array([[0, 1], [1, 1], [3, 2]], np.int32),
        np.array([[1, 1, 2], [3, 2, 3]], np.int32),
    ),
)


@pytest.fixture(scope="module")
def found():
    """(tokens [2, T], table, matrix, streams, cotangent, output, gradients) in float64."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, 40)).astype(np.int32)
    table = np.concatenate([rng.normal(size=(5, D_MEM)), np.zeros((1, D_MEM))])
    matrix, g = rng.normal(size=(D_MEM, D)), rng.normal(size=(2, 40, STREAMS, D))
    streams = np.repeat(rng.normal(size=(VOCAB, D))[tokens][:, :, None], STREAMS, axis=2)
    addresses = find(lookback(tokens, LAYER), LAYER)
    with jax.enable_x64(True):
        own = {"init_std": 1.0, "dtype": "float64", "param_dtype": "float64"}
        graphdef, _ = nnx.split(FgramEmbedding(D_MEM, D, **own, rngs=nnx.Rngs(0)))

        def total(table, matrix, streams):
            module = nnx.merge(graphdef, {"fgram_proj": matrix})
            out, gate = module(table[addresses], streams, jnp.ones_like(tokens))
            assert gate is None
            return jnp.sum(out * g), out

        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
        (_, out), grads = run(*map(jnp.asarray, (table, matrix, streams)))
    return tokens, table, matrix, streams, g, np.asarray(out), tuple(map(np.asarray, grads))


def test_values_and_gradients_equal_numpy(found):
    tokens, table, matrix, streams, g, out, (g_table, g_matrix, g_streams) = found
    e_table, e_matrix = np.zeros(table.shape), np.zeros(matrix.shape)
    without = 0
    for b in range(2):
        expected = oracle.added(tokens[b], streams[b], LAYER, table, matrix)
        np.testing.assert_allclose(out[b], expected, rtol=1e-12, atol=1e-12)
        for t, row in enumerate(oracle.longest(tokens[b], LAYER)):
            if row is None:
                without += 1
                assert not np.any(out[b, t]) and not np.any(g_streams[b, t])
                continue
            np.testing.assert_array_equal(g_streams[b, t], -g[b, t])  # the embedding's, cancelled
            both = g[b, t].sum(0)
            e_table[row] += matrix @ both
            e_matrix += np.outer(table[row], both)
    assert 0 < without < 80 and np.all(e_table[:5].any(axis=1))  # every f-gram is there
    np.testing.assert_allclose(g_table, e_table, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(g_matrix, e_matrix, rtol=1e-12, atol=1e-12)
    assert not np.any(g_table[5])


@pytest.mark.parametrize("devices", [1, 2])
def test_the_spare_row_starts_as_zeros(devices):
    layout = TableLayout(6, devices, spare=1)
    rows = np.asarray(init_table(jax.random.key(0), layout, 4, 0.5, jnp.dtype("float32")).rows)
    at = [(a % devices) * layout.rows_per_device + a // devices for a in range(6)]
    assert not np.any(rows[at[5]]) and np.all(rows[at[:5]].any(axis=1))
    plain = init_table(jax.random.key(0), TableLayout(6, devices), 4, 0.5, jnp.dtype("float32"))
    np.testing.assert_array_equal(np.asarray(plain.rows)[at[:5]], rows[at[:5]])


def test_masked_tokens_keep_their_own_embedding():
    module = FgramEmbedding(
        D_MEM, D, init_std=1.0, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0)
    )
    rows, streams = jnp.ones((1, 4, 1, D_MEM)), jnp.ones((1, 4, STREAMS, D))
    mask = jnp.array([[True, False, True, False]])
    out, _ = module(rows, streams, jnp.ones((1, 4), int), mask)
    assert not np.any(out[:, 1::2]) and np.all(np.any(out[:, ::2] != 0, axis=(2, 3)))
