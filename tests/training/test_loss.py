"""The chunked loss and its gradients against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.training.loss import cross_entropy, target_nats


def oracle(hidden, matrix, targets, mask):
    """Loss and gradients, one token at a time, float64."""
    loss, grad_h, grad_w = 0.0, np.zeros_like(hidden), np.zeros_like(matrix)
    for index in np.ndindex(targets.shape):
        h, target, weight = hidden[index], targets[index], mask[index]
        logits = matrix @ h
        p = np.exp(logits - logits.max())
        p /= p.sum()
        loss -= weight * np.log(p[target])
        p[target] -= 1
        grad_h[index] = weight * p @ matrix
        grad_w += weight * np.outer(p, h)
    return loss, grad_h, grad_w


@pytest.mark.parametrize("chunk", [1, 7, 12, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients(chunk, dtype):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 9, 8))
    matrix = rng.normal(size=(21, 8))
    targets = rng.integers(0, 21, (3, 9))
    mask = rng.integers(0, 2, (3, 9)).astype(np.float64)
    h, w = jnp.asarray(hidden, dtype), jnp.asarray(matrix, dtype)
    hidden, matrix = np.asarray(h, np.float64), np.asarray(w, np.float64)

    weight = 1.00391 / 16  # bfloat16 would round it to 1.0078 / 16

    def weighted(h, w):
        total = cross_entropy(h, w, jnp.asarray(targets), jnp.asarray(mask, "float32"), chunk=chunk)
        return total * weight

    loss, (grad_h, grad_w) = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1)))(h, w)
    expected = [x * weight for x in oracle(hidden, matrix, targets, mask)]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(weighted)(h, w), expected[0], rtol=1e-5)
    for ours, theirs in ((grad_h, expected[1]), (grad_w, expected[2])):
        error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
        assert error < tolerance
        scale = np.sum(np.asarray(ours, np.float64) * theirs) / np.sum(theirs**2)
        assert abs(scale - 1) < 3e-3  # of one rounding per entry, not all the same way


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_target_s_loss(chunk):
    """In float64, and what they add up to in float32."""
    rng = np.random.default_rng(1)
    hidden, matrix = rng.normal(size=(3, 9, 8)), rng.normal(size=(21, 8))
    targets = rng.integers(0, 21, (3, 9))
    ones = np.ones((3, 9))
    each = [
        oracle(hidden[at][None], matrix, targets[at][None], ones[at][None])[0]
        for at in np.ndindex(3, 9)
    ]
    with jax.enable_x64(True):
        found = jax.jit(target_nats, static_argnames="chunk")(
            jnp.asarray(hidden), jnp.asarray(matrix), jnp.asarray(targets), chunk=chunk
        )
        assert found.shape == (3, 9) and found.dtype == jnp.float64
        np.testing.assert_allclose(np.ravel(found), each, rtol=1e-12)
    h, w = jnp.asarray(hidden, "float32"), jnp.asarray(matrix, "float32")
    found = target_nats(h, w, jnp.asarray(targets), chunk=chunk)
    total = cross_entropy(h, w, jnp.asarray(targets), jnp.asarray(ones, "float32"), chunk=chunk)
    np.testing.assert_allclose(np.asarray(found, np.float64).sum(), total, rtol=1e-6)
