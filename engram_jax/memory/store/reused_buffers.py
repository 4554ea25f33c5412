"""Buffers that each thread reuses from call to call.

New memory costs a page fault per 4 KiB, which for a large request is more than the work itself (0.5
milliseconds for the distinct rows of 4,096 tokens).
"""

from __future__ import annotations

import threading

import numpy as np


class Scratch:
    """One buffer per name and thread, as large as the largest requested."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, name: str, rows: int, width: int, dtype: type) -> np.ndarray:
        """An uninitialised array, dtype [rows, width], C-contiguous; valid until the next call with
        this name in this thread."""
        kept: np.ndarray | None = getattr(self._local, name, None)
        if kept is None or kept.size < rows * width or kept.dtype != dtype:
            kept = np.empty(rows * width, dtype)
            setattr(self._local, name, kept)
        return kept[: rows * width].reshape(rows, width)
