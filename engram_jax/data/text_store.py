"""Stores documents on disk: for each split one file of all texts, and where each starts.

Documents are in the order of their digests, so the files are a function of the set of documents
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engram_jax.config.errors import UserError
from engram_jax.data.documents import Spool

TRAIN, VALIDATION = "train", "validation"


def write(
    spool: Spool, held_out: np.ndarray, folder: Path, left_out: np.ndarray | None = None
) -> None:
    """Write the spool's documents into `folder`; held_out, left_out: bool [documents], those for
    validation and those for neither split."""
    order = spool.digest_order()
    if left_out is not None:
        order = order[~left_out[order]]
    held = held_out[order]
    for split, chosen in ((TRAIN, order[~held]), (VALIDATION, order[held])):
        with open(folder / f"{split}.txt", "wb") as file:
            file.writelines(spool.read(chosen))
        np.save(folder / f"{split}.npy", np.cumsum([0, *spool.sizes[chosen]], dtype=np.int64))


def read(folder: Path, split: str) -> Iterator[str]:
    """The documents of one split, in order, one at a time. Raises UserError for a damaged file."""
    starts, path = np.load(folder / f"{split}.npy"), folder / f"{split}.txt"
    if path.stat().st_size != starts[-1]:
        raise UserError(
            f"{path}: {path.stat().st_size:,} bytes instead of {int(starts[-1]):,}; delete"
            f" {folder} and run again"
        )
    with open(path, "rb") as file:
        for size in np.diff(starts).tolist():
            yield file.read(size).decode()
