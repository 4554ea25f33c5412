"""FP8 rows and weights against NumPy, and against the released formats' reader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.engram_gate import quantise
from kernels_pallas.engram_gate.quantise import MX, RECIPES, Quantised
from tests.oracle import fp8, released_fp8


def test_the_oracles_rounding_is_the_format():
    """Every e4m3 number is its own rounding, and between two lie their halves."""
    every = np.float64(jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn))
    every = every[np.isfinite(every)]
    np.testing.assert_array_equal(fp8.e4m3(every), every)
    x = np.random.default_rng(0).normal(size=4000) * 2.0 ** np.arange(-12, 8).repeat(200)
    x = np.clip(x, -448, 448)
    np.testing.assert_array_equal(fp8.e4m3(x), np.float64(jnp.asarray(x, jnp.float8_e4m3fn)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("of", ["rows", "weights"])
def test_against_numpy(recipe, of):
    """Equal but where float32's quotient and float64's lie on two sides of a middle."""
    rng = np.random.default_rng(2)
    shape = (50, 256) if of == "rows" else (256, 3, 128)
    x = np.float32(rng.normal(size=shape) * 2.0 ** rng.integers(-20, 20, shape))
    x.reshape(-1)[:300] = 0
    if of == "rows":
        ours = quantise.dequantise_rows(
            jax.jit(quantise.quantise_rows, static_argnums=1)(x, recipe)
        )
        theirs = fp8.rows(np.float64(x), recipe)
    else:
        found = jax.jit(quantise.quantise_weights, static_argnums=1)(x, recipe)
        ours, theirs = quantise.dequantise_weights(found), fp8.weights(np.float64(x), recipe)
    ours = np.float64(ours)
    same = np.isclose(ours, theirs, rtol=1e-6, atol=0)
    assert same.all() if recipe == MX else same.mean() > 0.9995
    # Such a value is as far from one neighbour as from the other.
    np.testing.assert_allclose(abs(ours - x)[~same], abs(theirs - x)[~same], rtol=1e-4)


def test_released_formats_are_read_alike():
    """The recipe mx is DeepSeek-V4.1's layout: rows with a scale for 32 columns, 32 x 32 blocks."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 256, (20, 64), np.uint8)
    scale = rng.integers(0, 256, (20, 2), np.uint8)
    rows = Quantised(jnp.asarray(bits).view(jnp.float8_e4m3fn), jnp.asarray(scale), MX)
    np.testing.assert_array_equal(
        quantise.dequantise_rows(rows), released_fp8.dequantise_rows(jnp.asarray(bits), scale)
    )
    bits = rng.integers(0, 256, (64, 96), np.uint8)  # [M + 1 times d, C], as released
    scale = rng.integers(100, 150, (2, 3), np.uint8)
    released = released_fp8.dequantise_blocks(jnp.asarray(bits), jnp.asarray(scale))
    weights = Quantised(
        jnp.asarray(bits.T.reshape(96, 2, 32)).view(jnp.float8_e4m3fn),
        jnp.asarray(scale.T.reshape(3, 2, 1)),
        MX,
    )
    ours = quantise.dequantise_weights(weights).reshape(96, 64).T
    np.testing.assert_array_equal(ours, released)


def test_scales_are_powers_of_two_for_mx():
    largest = jnp.asarray([448.0, 448.5, 1e-45, 0.0, 3e38, 896.0, 224.0, 1.75])
    scale = np.float64(quantise.scale_of(largest, MX))
    np.testing.assert_array_equal(np.log2(scale), np.round(np.log2(scale)))
    np.testing.assert_array_equal(scale, fp8.scale_for(np.float64(largest), True))


def test_bad_arguments():
    with pytest.raises(ValueError, match="'fp4' is not one of"):
        Quantised(jnp.zeros((2, 2)), jnp.zeros((2, 1)), "fp4")
    with pytest.raises(ValueError, match="100 columns do not divide into groups of 32"):
        quantise.quantise_rows(jnp.zeros((2, 100)), MX)
