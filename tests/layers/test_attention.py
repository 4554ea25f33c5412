"""Attention's forward pass against loops in NumPy, its written-out backward pass against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers import attention
from engram_jax.layers.attention import causal_attention

B, T, H, K, V, SCALE = 2, 12, 3, 6, 5, 0.4
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 2 + [2] * 8 + [0] * 2], np.int32)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    widths = {"query": K, "keys": K, "values": V, "cotangent": V}
    return {name: rng.normal(size=(B, T, H, width)) for name, width in widths.items()}


def oracle(query, keys, values):
    out = np.zeros((B, T, H, V))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
        scores = np.array([query[b, t, h] @ keys[b, s, h] * SCALE for s in seen])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, h] = sum(w * values[b, s, h] for w, s in zip(weights, seen, strict=True))
    return out


def plain(query, keys, values):
    scores = jnp.einsum("bshk,bthk->bhst", query, keys) * SCALE
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    visible = (same & np.tril(np.ones((T, T), bool)))[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthv->bshv", weights, values)


def run(function, values):
    @jax.jit
    def both(query, keys, values, cotangent):
        out, pull = jax.vjp(function, query, keys, values)
        return out, *pull(cotangent)

    return both(*values.values())


def ours(query, keys, values):
    return causal_attention(query, keys, values, jnp.asarray(SEGMENTS), SCALE)


@pytest.mark.parametrize("part", [128, 4], ids=["whole", "in three parts"])
def test_output_and_gradients_in_float64(part, monkeypatch):
    monkeypatch.setattr(attention, "PART", part)
    values = arrays()
    with jax.enable_x64():
        wide = {name: jnp.asarray(x) for name, x in values.items()}
        found, wanted = run(ours, wide), run(plain, wide)
    cotangent = values.pop("cotangent")
    np.testing.assert_allclose(found[0], oracle(**values), rtol=0, atol=1e-13)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)
    assert np.abs(cotangent).max() > 1


@pytest.mark.parametrize(("sharp", "mean"), [(1, 0), (3, 3), (10, 3), (30, 3)])
def test_bfloat16_is_as_near_to_float64_as_its_roundings(sharp, mean):
    """Of the same rounded inputs. Scores, softmax and the sums are in float32; weights and the
    gradients of scores are rounded once (2^-9 of a value), as are the results.

    sharp multiplies the scores: few keys get all of the weight, and a query's gradient is what
    remains of numbers near the mean of the values, which cancel."""
    values = arrays()
    values["query"] *= sharp
    values["values"] += mean
    rounded = {name: jnp.asarray(x, jnp.bfloat16) for name, x in values.items()}
    with jax.enable_x64():
        wanted = run(plain, {k: jnp.asarray(np.float64(x)) for k, x in rounded.items()})
    for one, other in zip(run(ours, rounded), wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        exact = np.asarray(other)
        error = np.linalg.norm(np.float64(one) - exact) / np.linalg.norm(exact)
        assert error < 2**-8, error


def test_padding_gives_finite_numbers():
    values = arrays()
    found = run(ours, {name: jnp.asarray(x, jnp.float32) for name, x in values.items()})
    assert all(np.isfinite(x).all() for x in found)
