"""The formats of stored rows: encodes numbers to bytes, and decodes bytes on the device.

A row is transferred to the device as stored bytes and decoded there, so that an FP8 row of 256
takes 264 bytes and not 512. Decoding is exact on any device: it works on bit patterns, because
accelerators and XLA on CPUs flush subnormal floats, so that a product would not be exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from engram_jax.config import ROW_FORMATS
from engram_jax.config.errors import UserError
from kernels_pallas import e8m0

if TYPE_CHECKING:
    import jax

GROUP = 32  # columns of an FP8 row under one scale, as in DeepSeek-V4.1
_ITEM_BYTES = dict(zip(ROW_FORMATS, (4, 2, 1), strict=True))
_PIECE = 1 << 16  # rows checked at a time
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class RowFormat:
    """How one row of `dim` numbers is stored.

    name: "float32", "bfloat16", or "fp8": E4M3 values with one E8M0 scale, a power of two
      2 ** (byte - 127), for each 32 neighbouring columns. All little-endian.
    dim: numbers per row. Raises UserError for an unknown name or a dim that fp8 cannot divide.
    """

    name: str
    dim: int

    def __post_init__(self) -> None:
        if self.name not in _ITEM_BYTES:
            raise UserError(f"row format {self.name!r}: must be one of {', '.join(_ITEM_BYTES)}")
        if self.dim < 1 or (self.name == "fp8" and self.dim % GROUP):
            unit = f"a multiple of {GROUP}" if self.name == "fp8" else "at least 1"
            raise UserError(f"row format {self.name}, dim {self.dim}: dim must be {unit}")

    @cached_property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(suffix of the tensor's name, bytes per row) of each array that stores the rows."""
        weight = ("weight", self.dim * _ITEM_BYTES[self.name])
        return (weight, ("scale", self.dim // GROUP)) if self.name == "fp8" else (weight,)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row, all parts together."""
        return sum(size for _, size in self.parts)

    def empty(self, rows: int) -> tuple[np.ndarray, ...]:
        """Buffers for `rows` rows: uint8 [rows, bytes_i] for each part, uninitialised, at multiples
        of 64 bytes."""
        return tuple(_aligned(rows, size) for _, size in self.parts)

    def decode(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """Stored bytes, uint8 [..., bytes_i] for each part -> numbers [..., dim]; to be jitted.

        float32 -> float32 and bfloat16 -> bfloat16, the same bits. fp8 -> bfloat16: E4M3 times a
        power of two has 4 significant bits and is exact in bfloat16. Only results out of bfloat16's
        range differ: from 2**128 on infinity of the value's sign, below 2**-126 bfloat16's
        subnormals, which need rounding (to nearest, ties to even) only for scales below 2**-124. A
        NaN value or scale (byte 255) gives NaN.
        """
        import jax
        import jax.numpy as jnp

        if self.name != "fp8":
            kind = jnp.dtype(self.name)
            grouped = parts[0].reshape(*parts[0].shape[:-1], self.dim, kind.itemsize)
            return jax.lax.bitcast_convert_type(grouped, kind)
        values, scales = parts
        wide = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.bfloat16)
        bits = jax.lax.bitcast_convert_type(wide, jnp.uint16).astype(jnp.int32)
        scale = jnp.repeat(scales.astype(jnp.int32), GROUP, axis=-1)
        sign, exponent, fraction = bits & 0x8000, (bits >> 7) & 0xFF, bits & 0x7F
        moved = exponent + scale - e8m0.BIAS
        shift = jnp.clip(1 - moved, 1, 9)  # from 9 on every value rounds to zero
        whole = 0x80 | fraction
        kept = whole >> shift
        rest, half = whole - (kept << shift), 1 << (shift - 1)
        subnormal = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1)))
        magnitude = jnp.where(moved > 0, (moved << 7) | fraction, subnormal)
        magnitude = jnp.where(moved >= 255, 0x7F80, magnitude)
        magnitude = jnp.where(exponent == 0, 0, magnitude)  # E4M3 has no bfloat16 subnormals: zero
        magnitude = jnp.where((exponent == 255) | (scale == 255), 0x7FC0, magnitude)
        out = (sign | magnitude).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(out, jnp.bfloat16)

    def encode(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Numbers, float32 or bfloat16 [n, dim] -> stored bytes, uint8 [n, bytes_i] for each part.
        Numbers that need no conversion are not copied: the result is a view of `rows`.

        bfloat16 from float32 rounds to nearest, ties to even. fp8: the scale of 32 columns is the
        smallest power of two (E8M0: 2**-127 to 2**127) with which their largest magnitude is at
        most 448; values round to nearest, ties to even.

        Raises UserError for another shape or dtype and for values that are not finite.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise UserError(f"rows of shape {list(rows.shape)}: must be [n, {self.dim}]")
        if rows.dtype not in (np.float32, ml_dtypes.bfloat16):
            raise UserError(f"rows of dtype {rows.dtype}: must be float32 or bfloat16")
        if (at := _first_not_finite(rows)) is not None:
            raise UserError(f"row {at}: holds a value that is not finite; table rows must be")
        if self.name == "float32":
            return (_bytes(rows.astype("<f4", copy=False)),)
        if self.name == "bfloat16":
            rounded = rows.astype(ml_dtypes.bfloat16, copy=False)
            if rounded is not rows and _first_not_finite(rounded) is not None:
                raise UserError("rows: a value is too large for bfloat16, at most 3.3895e38")
            return (_bytes(rounded),)
        return _encode_fp8(rows.astype(np.float32))


def _first_not_finite(rows: np.ndarray) -> int | None:
    """The first row with a value that is not finite, or None. In chunks: a table may fill memory,
    which leaves no room for its mask."""
    for start in range(0, len(rows), _PIECE):
        finite = np.isfinite(rows[start : start + _PIECE]).all(axis=1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def _bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


def _encode_fp8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, dim] -> E4M3 bytes [n, dim], E8M0 bytes [n, dim / 32]."""
    groups = rows.reshape(len(rows), -1, GROUP)
    fraction, exponent = np.frexp(np.abs(groups).max(axis=-1))  # 448 = 0.875 * 2**9
    power = np.where(fraction <= _E4M3_MAX / 512, exponent - 9, exponent - 8)
    power = np.where(fraction == 0, -e8m0.BIAS, np.maximum(power, -e8m0.BIAS))
    shrink = np.ldexp(np.float32(1), -power).astype(np.float32)  # at most 2**127
    values = (groups * shrink[..., None]).astype(ml_dtypes.float8_e4m3fn)
    return _bytes(values.reshape(rows.shape)), (power + e8m0.BIAS).astype(np.uint8)


def _aligned(rows: int, size: int) -> np.ndarray:
    memory = np.empty(rows * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + rows * size].reshape(rows, size)
