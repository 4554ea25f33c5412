"""Small tables in every format, and what NumPy says their stored bytes are."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from engram_jax.memory.store.row_format import RowFormat

FORMATS = [RowFormat("float32", 6), RowFormat("bfloat16", 5), RowFormat("fp8", 64)]
FORMATS += [
    RowFormat("fp8", 256),
    RowFormat("float32", 1100),
]  # released; a row longer than a block


def numbers(row_format: RowFormat, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, row_format.dim)).astype(np.float32)


def stored(row_format: RowFormat, rows: np.ndarray) -> list[np.ndarray]:
    """The parts by ml_dtypes alone, one after the other."""
    if row_format.name == "float32":
        return [rows.view(np.uint8)]
    if row_format.name == "bfloat16":
        return [rows.astype(ml_dtypes.bfloat16).view(np.uint8)]
    groups = rows.reshape(len(rows), -1, 32)
    power = np.ceil(np.log2(np.abs(groups).max(axis=-1).astype(np.float64) / 448))
    values = (groups / 2.0 ** power[..., None]).astype(ml_dtypes.float8_e4m3fn)
    return [values.reshape(rows.shape).view(np.uint8), (power + 127).astype(np.uint8)]
