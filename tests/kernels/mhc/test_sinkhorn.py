import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.mhc.sinkhorn import sinkhorn
from tests.oracle import hyper_connections as oracle


def random_logits(n, tokens, spread, seed=0):
    return np.random.default_rng(seed).normal(0, spread, (n, n, tokens))


def plain(logits, iterations, eps):
    """Divisions of the whole matrix, which JAX differentiates by itself."""
    m = jax.nn.softmax(logits, axis=0) + eps
    m = m / (m.sum(1, keepdims=True) + eps)

    def divide(m, _):
        m = m / (m.sum(0, keepdims=True) + eps)
        return m / (m.sum(1, keepdims=True) + eps), None

    return jax.lax.scan(divide, m, length=iterations - 1)[0]


@pytest.mark.parametrize(("n", "iterations"), [(1, 20), (4, 1), (4, 2), (3, 20), (4, 20), (8, 20)])
def test_value_and_gradient_are_those_of_the_divisions(n, iterations):
    logits = random_logits(n, 6, 2.0)
    cotangent = np.random.default_rng(1).normal(size=logits.shape)
    with jax.enable_x64():

        @jax.jit
        def run(logits, cotangent):
            values, pull = jax.vjp(lambda a: sinkhorn(a, iterations, 1e-6), logits)
            wanted, pull_wanted = jax.vjp(lambda a: plain(a, iterations, 1e-6), logits)
            return values, pull(cotangent)[0], wanted, pull_wanted(cotangent)[0]

        values, grads, wanted, wanted_grads = run(jnp.asarray(logits), jnp.asarray(cotangent))
    np.testing.assert_allclose(values, wanted, rtol=1e-13)
    np.testing.assert_allclose(grads, wanted_grads, rtol=1e-10, atol=1e-12)
    for t in range(6):
        want = oracle.sinkhorn(logits[..., t], iterations, 1e-6)
        np.testing.assert_allclose(values[..., t], want, rtol=1e-13)


@pytest.mark.parametrize("n", range(1, 9))
def test_twenty_iterations_are_doubly_stochastic(n):
    logits = jnp.asarray(random_logits(n, 64, 0.7), jnp.float32)
    matrix = np.asarray(jax.jit(sinkhorn, static_argnums=(1, 2))(logits, 20, 1e-6))
    assert matrix.dtype == np.float32
    assert matrix.min() > 0
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-3)


def test_extreme_logits_stay_finite_with_finite_gradients():
    """Whole rows and columns below any float32 exponential, and a permutation out of reach."""
    logits = np.zeros((4, 4, 3), np.float32)
    logits[:, 0, 0], logits[1, :, 1] = 300.0, -300.0
    logits[..., 2] = 80.0 * np.random.default_rng(0).normal(size=(4, 4))

    def loss(a):
        m = sinkhorn(a, 20, 1e-6)
        return jnp.sum(jnp.square(m)), m

    grads, matrix = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(logits))
    assert np.isfinite(matrix).all()
    assert np.isfinite(grads).all()
    np.testing.assert_allclose(np.asarray(matrix).sum(1), 1, atol=1e-4)
    for t in range(3):
        want = oracle.sinkhorn(logits[..., t].astype(np.float64), 20, 1e-6)
        np.testing.assert_allclose(matrix[..., t], want, atol=1e-4)
