"""The Engram module's switches (gate, multi_branch, conv_kernel) against NumPy, both passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import PAPER, QWEN, V41, EngramConfig
from engram_jax.layers.engram import Engram
from tests.layers.filled import filled
from tests.oracle import engram_variants as oracle

EPS, WIDTH, STREAMS, LENGTH = 1e-3, 6, 3, 9  # an eps that is felt

VARIANTS = {
    "one": {"gate": "one"},
    "learned": {"gate": "learned"},
    "one branch": {"multi_branch": False},
    "one branch, one": {"multi_branch": False, "gate": "one", "conv_kernel": 0},
    "one branch, learned": {"multi_branch": False, "gate": "learned"},
    "no conv": {"conv_kernel": 0},
    "v41, learned": {"form": V41, "gate": "learned"},
    "qwen, one branch": {"form": QWEN, "multi_branch": False, "conv_kernel": 1},
}


def build(keys, dtype="float64", seed=0):
    base = {"layers": (1,), "heads_per_order": 1, "d_mem": 4, "conv_kernel": 3}
    config = EngramConfig(**{**base, **keys})

    def create():
        return Engram(
            WIDTH,
            STREAMS,
            config,
            norm_eps=EPS,
            init_std=0.02,
            dtype=dtype,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )

    return config, filled(create, seed)


def inputs(seed=1):
    """rows [T, H, dim], streams [T, M, d], and a mask whose second token has no memory."""
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) != 1
    return rng.normal(size=(LENGTH, 2, 2)), rng.normal(size=(LENGTH, STREAMS, WIDTH)), mask


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_equal_numpy(name):
    with jax.enable_x64(True):
        config, module = build(VARIANTS[name])
        graphdef, state = nnx.split(module)
        params = nnx.to_pure_dict(state)
        rows, streams, mask = inputs()
        offset = 1.0 if config.form == QWEN else 0.0
        paper = config.form == PAPER

        @jax.jit
        def both_passes(params, rows, streams, cotangent):
            def forward(params, rows, streams):
                made = nnx.merge(graphdef, params)
                ones = jnp.ones((1, LENGTH), jnp.int32)
                return made(rows[None], streams[None], ones, jnp.asarray(mask)[None])

            out, pullback, gate = jax.vjp(forward, params, rows, streams, has_aux=True)
            return out[0], gate, pullback(cotangent[None])

        def reference(values):
            rows, streams, *leaves = values
            given = jax.tree.unflatten(jax.tree.structure(params), leaves)
            for norm in ("query_norm", "key_norm"):
                if norm in given:
                    given[norm] = {"gain": given[norm]["gain"] + offset}
            if "conv" in given:
                gain = given["conv"]["norm"]["gain"] + offset
                given["conv"] = given["conv"] | {"norm": {"gain": gain}}
            return oracle.engram(
                rows.reshape(LENGTH, -1),
                streams,
                given,
                mask,
                gate=config.gate,
                multi_branch=config.multi_branch,
                dilation=config.max_ngram,
                gate_eps=np.finfo(np.float64).eps if paper else EPS,
                conv_eps=1e-5 if paper else EPS,
            )

        leaves = [np.asarray(x) for x in jax.tree.leaves(params)]
        values = [rows, streams, *leaves]
        expected, gates = reference(values)
        cotangent = np.random.default_rng(2).normal(size=expected.shape)
        out, gate, found = both_passes(params, rows, streams, cotangent)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
        assert np.abs(expected).max() > 0.1 and not expected[~mask].any()
        if config.gate == "one":
            assert gate is None
        else:
            np.testing.assert_allclose(gate[0], gates, rtol=1e-12)
        d_params, d_rows, d_streams = found
        found = [d_rows, d_streams, *jax.tree.leaves(d_params)]
        wanted = oracle.gradients(lambda v: reference(v)[0], values, cotangent)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-7 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("one", {"projection": (4, 1, 6), "bias": (1, 6)}),
        ("learned", {"projection": (4, 1, 6), "bias": (1, 6), "gate_logit": (3,)}),
        (
            "one branch",
            {"projection": (4, 2, 6), "bias": (2, 6), "query_norm": (1, 6), "key_norm": (1, 6)},
        ),
        ("one branch, one", {"projection": (4, 1, 6), "bias": (1, 6)}),
        ("v41, learned", {"projection": (4, 1, 6), "gate_logit": (3,)}),
    ],
)
def test_there_is_no_parameter_without_a_use(name, parameters):
    _, module = build(VARIANTS[name], "float32")
    found = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    conv = found.pop("conv", None)
    branches = 1 if "one branch" in name else 3
    assert (conv is None) == (name in ("one branch, one", "v41, learned"))
    if conv is not None:
        assert conv["taps"].shape == (3, branches, 6)
    assert {k: jax.tree.leaves(v)[0].shape for k, v in found.items()} == parameters


def test_the_learned_gate_starts_at_one_half():
    config = EngramConfig(layers=(1,), heads_per_order=1, d_mem=4, gate="learned", form=V41)
    how = {"norm_eps": EPS, "init_std": 0.02, "dtype": "float32", "param_dtype": "float32"}
    module = Engram(WIDTH, STREAMS, config, **how, rngs=nnx.Rngs(0))
    rows, streams, _ = (jnp.asarray(x, "float32")[None] for x in inputs())
    _, gate = jax.jit(module)(rows, streams, jnp.ones((1, LENGTH), jnp.int32))
    np.testing.assert_array_equal(gate, np.full((1, LENGTH, STREAMS), 0.5, np.float32))


def test_chunks_equal_the_whole():
    """As tokens are decoded, with a tail of one branch."""
    _, module = build(VARIANTS["one branch, learned"], "float32")
    graphdef, params = nnx.split(module)
    rows, streams, mask = (
        jnp.asarray(np.stack([x, x[::-1]]), bool if x.dtype == bool else "float32")
        for x in inputs()
    )
    whole, _ = jax.jit(module)(rows, streams, jnp.ones((2, LENGTH), jnp.int32), mask)

    @jax.jit
    def cached(*arguments):
        return nnx.merge(graphdef, params).cached(*arguments)

    tail, done = module.init_tail(2, "float32"), 0
    assert tail.shape == (2, 6, 1, WIDTH)
    for take in (4, 4, 1):
        part = slice(done, done + take)
        valid = jnp.full(2, take)
        out, tail = cached(rows[:, part], streams[:, part], tail, valid, mask[:, part])
        np.testing.assert_allclose(out, whole[:, part], rtol=1e-5, atol=1e-6)
        done += take
    assert done == LENGTH


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 6e-3), ("fp8", 6e-2)])
def test_the_value_alone_is_projected_in_the_configured_precision(precision, bound):
    keys = {"d_mem": 128, "gate": "one", "form": V41, "precision": precision}
    config = EngramConfig(layers=(1,), heads_per_order=2, fp8_recipe="channel", **keys)
    how = {"norm_eps": EPS, "init_std": 0.02, "dtype": "float32", "param_dtype": "float32"}
    module = Engram(32, 2, config, **how, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 5, 4, 32)).astype(np.float32)
    out, _ = jax.jit(module)(
        jnp.asarray(rows), jnp.zeros((1, 5, 2, 32)), jnp.ones((1, 5), jnp.int32)
    )
    exact = rows.reshape(5, 128).astype(np.float64) @ np.float64(module.projection[...])[:, 0]
    error = np.linalg.norm(out[0, :, 0] - exact) / np.linalg.norm(exact)
    assert bound / 20 < error < bound
