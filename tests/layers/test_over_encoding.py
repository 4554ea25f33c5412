"""OverEncoding and the vectors of case against NumPy, both passes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.layers.case_vectors import CaseVectors
from engram_jax.layers.over_encoding import OverEncoding
from tests.layers.filled import filled
from tests.oracle import engram_variants as oracle

CONFIG = EngramConfig(
    layers=(0,), orders=(2, 3, 4), heads_per_order=2, d_mem=12, form="over_encoding"
)
LENGTH, STREAMS, WIDTH = 5, 2, 4
MASK = np.arange(LENGTH) != 3


def build(dtype):
    return filled(
        lambda: OverEncoding(
            WIDTH, CONFIG, init_std=0.02, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
        )
    )


def inputs():
    """rows [T, H, dim]; streams [T, M, d], all equal to the embedding, as at layer 0."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(LENGTH, 1, WIDTH))
    return rng.normal(size=(LENGTH, 6, 2)), np.repeat(x, STREAMS, axis=1)


def test_over_encoding_equals_numpy():
    with jax.enable_x64(True):
        graphdef, params = nnx.split(build("float64"))
        weights = params["order_projections"][...]
        assert weights.shape == (3, 4, WIDTH)
        rows, streams = inputs()

        def forward(params, rows, streams):
            module = nnx.merge(graphdef, params)
            out, gate = module(rows[None], streams[None], None, jnp.asarray(MASK)[None])
            assert gate is None
            return out[0]

        @jax.jit
        def both_passes(values, cotangent):
            out, pullback = jax.vjp(forward, *values)
            return out, pullback(cotangent)

        def reference(values):
            rows, streams, weights = values
            return oracle.over_encoding(rows.reshape(LENGTH, -1), streams, weights, MASK)

        values = [rows, streams, np.asarray(weights)]
        cotangent = np.random.default_rng(2).normal(size=streams.shape)
        out, found = both_passes((params, rows, streams), cotangent)
        out = np.asarray(out)
        np.testing.assert_allclose(out, reference(values), rtol=1e-12, atol=1e-14)
        # The streams after it are the mean of four embeddings; a masked token's stay.
        np.testing.assert_array_equal(out[3], np.zeros((STREAMS, WIDTH)))
        e = np.split(rows.reshape(LENGTH, -1), 3, axis=1)
        mean = (streams[:, 0] + sum(x @ w for x, w in zip(e, weights, strict=True))) / 4
        np.testing.assert_allclose((streams + out)[MASK, 1], mean[MASK], rtol=1e-12)
        d_params, d_rows, d_streams = found
        found = d_rows, d_streams, d_params["order_projections"][...]
        for ours, theirs in zip(found, oracle.gradients(reference, values, cotangent), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_over_encoding_decodes_what_it_trains():
    module = build("float32")
    rows, streams = (jnp.asarray(x, "float32")[None] for x in inputs())
    whole, _ = jax.jit(module)(rows, streams, None, jnp.asarray(MASK)[None])
    tail = module.init_tail(1, "float32")
    assert tail is None
    for part in (slice(0, 2), slice(2, 5)):
        mask = jnp.asarray(MASK)[None, part]
        out, tail = module.cached(rows[:, part], streams[:, part], tail, jnp.array([2]), mask)
        np.testing.assert_allclose(out, whole[:, part], rtol=1e-6)


def test_case_vectors_are_added_by_class():
    with jax.enable_x64(True):
        graphdef, params = nnx.split(filled(lambda: CaseVectors(12, param_dtype="float64")))
        rows, _ = inputs()
        classes = np.array([0, 9, 4, 4, 1])

        def reference(values):
            rows, vectors = values
            parts = [r.reshape(-1) + vectors[c] for r, c in zip(rows, classes, strict=True)]
            return np.stack(parts).reshape(rows.shape)

        def forward(params, rows):
            return nnx.merge(graphdef, params)(rows[None], jnp.asarray(classes)[None])[0]

        values = [rows, np.asarray(params["case"][...])]
        assert values[1].shape == (10, 12)
        out, pullback = jax.vjp(forward, params, jnp.asarray(rows))
        np.testing.assert_allclose(out, reference(values), rtol=1e-14)
        cotangent = np.random.default_rng(2).normal(size=out.shape)
        d_params, d_rows = pullback(jnp.asarray(cotangent))
        wanted = oracle.gradients(reference, values, cotangent)
        np.testing.assert_allclose(d_rows, wanted[0], atol=1e-8)
        np.testing.assert_allclose(d_params["case"][...], wanted[1], atol=1e-8)


def test_case_vectors_start_at_zero():
    made = CaseVectors(12, param_dtype="float32")
    rows = jnp.asarray(inputs()[0], "float32")[None]
    np.testing.assert_array_equal(made(rows, jnp.arange(LENGTH)[None]), rows)
