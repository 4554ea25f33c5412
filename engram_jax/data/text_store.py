"""Stores documents on disk: for each split one file of all texts, and where each starts.

Documents are in the order of their digests, so the files are a function of the set of documents
alone.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import load_array, open_file, read_json
from engram_jax.data.documents import Spool
from engram_jax.hardware.storage import write_text

TRAIN, VALIDATION = "train", "validation"
_CHECKSUMS = "crc32.json"  # of the text of each split


def write(
    spool: Spool, held_out: np.ndarray, folder: Path, left_out: np.ndarray | None = None
) -> None:
    """Write the spool's documents into `folder`; held_out, left_out: bool [documents], those for
    validation and those for neither split."""
    order = spool.digest_order()
    if left_out is not None:
        order = order[~left_out[order]]
    held, checksums = held_out[order], {TRAIN: 0, VALIDATION: 0}
    for split, chosen in ((TRAIN, order[~held]), (VALIDATION, order[held])):
        with open(folder / f"{split}.txt", "wb") as file:
            for text in spool.read(chosen):
                file.write(text)
                checksums[split] = zlib.crc32(text, checksums[split])
        np.save(folder / f"{split}.npy", np.cumsum([0, *spool.sizes[chosen]], dtype=np.int64))
    write_text(folder / _CHECKSUMS, json.dumps(checksums))


def read(folder: Path, split: str) -> Iterator[str]:
    """The documents of one split, in order, one at a time. Raises UserError for a damaged file, of
    an altered one (CRC-32; stores of earlier versions have none) at the end."""
    remedy = f"delete {shown(folder)} and run again"
    try:
        starts = load_array(folder / f"{split}.npy")
        stored, found = None, 0
        if (folder / _CHECKSUMS).exists():
            stored = read_json(folder / _CHECKSUMS).get(split)
        path = folder / f"{split}.txt"
        with open_file(path) as raw:
            if (size := os.fstat(raw.fileno()).st_size) != starts[-1]:
                raise UserError(f"{shown(path)}: {size:,} bytes instead of {int(starts[-1]):,}")
            with io.BufferedReader(raw) as file:
                for size in np.diff(starts).tolist():
                    text = file.read(size)
                    found = zlib.crc32(text, found)
                    yield text.decode()
        if stored is not None and found != stored:
            raise UserError(f"{shown(path)}: damaged, its CRC-32 is not the stored one")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: damaged, is no UTF-8 text; {remedy}") from error
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
