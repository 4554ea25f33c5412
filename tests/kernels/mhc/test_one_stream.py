"""One residual stream: the matrix that mixes streams is one number, whatever the logits."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.mhc.sinkhorn import sinkhorn


def test_the_number_and_no_gradient():
    iterations, eps = 20, 1e-3
    number = 1 + eps  # the softmax of one entry, to which eps is added; then rows, columns, rows ..
    for _ in range(2 * iterations - 1):
        number = number / (number + eps)
    with jax.enable_x64():
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 7)))
        found, pull = jax.vjp(lambda x: sinkhorn(x, iterations, eps), logits)
        (gradient,) = pull(jnp.ones_like(found))
    np.testing.assert_allclose(found, np.full((1, 1, 7), number), rtol=1e-14)
    np.testing.assert_array_equal(gradient, np.zeros((1, 1, 7)))
