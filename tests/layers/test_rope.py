import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.layers.rope import apply_rope, rope_tables
from tests.oracle.mla import rotate


def test_pairs_turn_by_the_oracle_angle_and_come_out_first_members_first():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(3, 5, 8)), rng.integers(0, 4000, (3, 5))
    with jax.enable_x64():
        cos, sin = rope_tables(jnp.asarray(positions, jnp.int32), 8, 10000.0)
        assert cos.dtype == sin.dtype == jnp.float32
        y = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    want = np.stack(
        [rotate(a, p, 10000.0) for a, p in zip(x.reshape(-1, 8), positions.ravel(), strict=True)]
    ).reshape(x.shape)
    # A float32 angle below 4096 is off by at most 2^-13 rad (two roundings of 2^-24 relative).
    np.testing.assert_allclose(y, np.concatenate([want[..., 0::2], want[..., 1::2]], -1), atol=1e-3)
    near = positions < 8
    np.testing.assert_allclose(
        y[near], np.concatenate([want[..., 0::2], want[..., 1::2]], -1)[near], atol=3e-6
    )


def test_dot_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)

    def dot(i, j):
        return apply_rope(q, *rope_tables(jnp.int32(i), 16, 100.0)) @ apply_rope(
            k, *rope_tables(jnp.int32(j), 16, 100.0)
        )

    np.testing.assert_allclose(dot(9, 4), dot(205, 200), rtol=1e-4)
    assert abs(dot(9, 4) - dot(9, 5)) > 1e-2


def test_low_precision_inputs_are_rotated_in_float32():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(7, 8)), jnp.bfloat16)
    cos, sin = rope_tables(jnp.arange(7), 8, 10.0)
    y = apply_rope(x, cos, sin)
    assert y.dtype == jnp.bfloat16
    want = apply_rope(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(y), np.float32(want))
