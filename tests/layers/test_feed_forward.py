import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.layers.feed_forward import SwiGLU
from tests.layers.filled import filled
from tests.oracle.moe import swiglu


def create(dtype, param_dtype):
    return SwiGLU(
        6,
        10,
        init_std=0.5,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.03), ("float32", 1e-5), ("float64", 1e-13)]
)
def test_matches_the_oracle(dtype, tolerance):
    param_dtype = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64():
        module = filled(lambda: create(dtype, param_dtype))
        x = np.random.default_rng(1).normal(size=(2, 3, 6))
        y = module(jnp.asarray(x, param_dtype))
        assert y.dtype == dtype
        weights = [np.asarray(w[...], np.float64) for w in (module.gate, module.up, module.down)]
    assert [w.shape for w in weights] == [(6, 10), (6, 10), (10, 6)]
    want = swiglu(x, *weights)
    np.testing.assert_allclose(np.float64(y), want, rtol=0, atol=tolerance * np.abs(want).max())
