"""Stored rows against ml_dtypes: every byte, every scale, both directions."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store.row_format import RowFormat

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def decoded(row_format: RowFormat, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.asarray(jax.jit(row_format.decode)(parts))


def reference_fp8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """By ml_dtypes and a float64 product, which is exact for every pair of bytes."""
    scale = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return (values.view(E4M3).astype(np.float64) * np.repeat(scale, 32, axis=-1)).astype(BF16)


def test_parts_are_the_released_layout():
    assert RowFormat("fp8", 256).parts == (("weight", 256), ("scale", 8))
    assert RowFormat("bfloat16", 80).parts == (("weight", 160),)
    assert RowFormat("float32", 3).parts == (("weight", 12),)
    assert RowFormat("fp8", 256).row_bytes == 264


def test_decode_of_every_fp8_byte_under_every_scale():
    values = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, axis=1)
    got = decoded(RowFormat("fp8", 256), (values, scales))
    want = reference_fp8(values, scales)
    nan = np.isnan(want.astype(np.float32))
    assert np.isnan(got.astype(np.float32))[nan].all() and nan.sum() == 255 * 2 + 256
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


@pytest.mark.parametrize(("name", "dtype"), [("float32", np.float32), ("bfloat16", BF16)])
def test_plain_formats_keep_every_bit(name, dtype):
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
    rows[0, :3] = [-0.0, np.finfo(np.float32).tiny / 4, 3e38]
    parts = RowFormat(name, 7).encode(rows)
    assert [p.dtype for p in parts] == [np.uint8]
    assert parts[0].tobytes() == rows.tobytes()
    got = decoded(RowFormat(name, 7), parts)
    assert got.dtype == dtype and got.tobytes() == rows.tobytes()


def test_bfloat16_from_float32_rounds_to_nearest():
    rows = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    assert RowFormat("bfloat16", 6).encode(rows)[0].tobytes() == rows.astype(BF16).tobytes()


def smallest_scale(group: np.ndarray) -> int:
    """By trying all of them."""
    largest = np.abs(group.astype(np.float64)).max()
    return next(byte for byte in range(255) if largest <= 448.0 * 2.0 ** (byte - 127))


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_fp8_takes_the_smallest_scale_and_rounds_to_nearest(dtype):
    rng = np.random.default_rng(2)
    rows = (rng.normal(size=(64, 64)) * 2.0 ** rng.integers(-140, 120, (64, 1))).astype(dtype)
    rows[0, :32] = 0
    rows[1, :32], rows[2, :32] = 448.0, np.nextafter(np.float32(448.0), np.float32(500))
    rows[3, 0] = -3.38e38
    values, scales = RowFormat("fp8", 64).encode(rows)
    want = [[smallest_scale(row[i : i + 32]) for i in (0, 32)] for row in rows]
    np.testing.assert_array_equal(scales, want)
    assert scales[1, 0] == 127 and (dtype is BF16 or scales[2, 0] == 128)
    power = np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1)
    exact = rows.astype(np.float64) / power
    table = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    table = np.unique(table[np.isfinite(table)])
    nearest = np.abs(table[:, None] - exact.reshape(1, -1)).min(axis=0)
    np.testing.assert_array_equal(
        np.abs(values.view(E4M3).astype(np.float64) - exact).ravel(), nearest
    )
    # Ties: one column half-way between two neighbours goes to the even one.
    tie = np.zeros((1, 32), np.float32)
    tie[0, :4] = [448, 17, 19, -17]
    assert list(RowFormat("fp8", 32).encode(tie)[0].view(E4M3).astype(int)[0, :4]) == [
        448,
        16,
        20,
        -16,
    ]


def test_what_was_decoded_encodes_to_the_same_numbers():
    rows = np.random.default_rng(3).normal(size=(16, 96)).astype(np.float32)
    form = RowFormat("fp8", 96)
    once = decoded(form, form.encode(rows))
    twice = decoded(form, form.encode(once))
    assert once.tobytes() == twice.tobytes()
    assert np.abs(once.astype(np.float32) - rows).max() < 0.07 * np.abs(rows).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8"])
def test_values_that_are_not_finite_are_refused(name, bad):
    rows = np.zeros((3, 32), np.float32)
    rows[2, 5] = bad
    with pytest.raises(UserError, match=r"row 2: .*not finite"):
        RowFormat(name, 32).encode(rows)


def test_what_bfloat16_would_round_to_infinity_is_refused():
    with pytest.raises(UserError, match="too large for bfloat16"):
        RowFormat("bfloat16", 1).encode(np.full((1, 1), np.finfo(np.float32).max))


def test_wrong_formats_and_shapes_are_refused():
    with pytest.raises(UserError, match="'fp4': must be one of float32, bfloat16, fp8"):
        RowFormat("fp4", 32)
    with pytest.raises(UserError, match="dim 33: dim must be a multiple of 32"):
        RowFormat("fp8", 33)
    with pytest.raises(UserError, match="dim 0: dim must be at least 1"):
        RowFormat("float32", 0)
    with pytest.raises(UserError, match=r"shape \[2, 3\]: must be \[n, 4\]"):
        RowFormat("float32", 4).encode(np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match="dtype float64: must be float32 or bfloat16"):
        RowFormat("float32", 3).encode(np.zeros((2, 3)))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_rows_that_are_stored_as_they_are_take_no_memory_again(name):
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.float32
    rows = np.arange(64).reshape(4, 16).astype(dtype)
    (stored,) = RowFormat(name, 16).encode(rows)
    assert np.shares_memory(stored, rows)
    rows = np.zeros((70_000, 16), dtype)
    rows[69_999, 3] = np.nan
    with pytest.raises(UserError, match="row 69999"):
        RowFormat(name, 16).encode(rows)
