import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.norm import RMSNorm, rms_norm


def oracle(x, gain, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


@pytest.mark.parametrize("gain_shape", [(8,), (3, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
def test_matches_the_formula(gain_shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, gain = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=gain_shape)
    with jax.enable_x64():
        y = rms_norm(jnp.asarray(x, dtype), jnp.asarray(gain, dtype), 1e-3)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, oracle(x, gain, 1e-3), rtol=tolerance, atol=tolerance)


def test_low_precision_inputs_are_normalised_in_float32():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 512)) * 1e3, jnp.bfloat16)
    y = rms_norm(x, None, 1e-6)
    assert y.dtype == jnp.bfloat16
    want = jnp.asarray(oracle(x, 1.0, 1e-6), jnp.bfloat16)
    # One bfloat16 step (2^-8 relative), because float32 and float64 may round to either side.
    np.testing.assert_allclose(np.float32(y), np.float32(want), rtol=2**-7)
    assert np.mean(np.float32(y) == np.float32(want)) > 0.99


@pytest.mark.parametrize("shape", [8, (3, 8)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_module_starts_with_gain_one_and_keeps_it_minus_the_offset(shape, offset):
    norm = RMSNorm(shape, 1e-6, gain_offset=offset)
    assert norm.gain.shape == ((8,) if shape == 8 else shape)
    np.testing.assert_array_equal(norm.gain[...], 1.0 - offset)
    x = np.random.default_rng(2).normal(size=(2, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(norm(jnp.asarray(x)), oracle(x, 1.0, 1e-6), rtol=1e-6, atol=1e-6)
    norm.gain[...] = norm.gain[...] + 0.5
    np.testing.assert_allclose(norm(jnp.asarray(x)), oracle(x, 1.5, 1e-6), rtol=1e-6, atol=1e-6)
