"""Stores a tokenised split: one flat array of token ids on disk, and where each document starts."""

from __future__ import annotations

import array
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram_jax.config.errors import UserError

_BATCH_BYTES = 4 << 20  # text handed to the tokenizer's threads at a time
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class TokenStore:
    """Token ids of a split's documents, each followed by the end-of-document id, memory-mapped.

    folder: has tokens.bin, starts.npy and store.json. A pickled copy opens it again.
    """

    folder: Path

    @cached_property
    def _meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "store.json").read_text())

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [tokens]: all documents, concatenated."""
        path = self.folder / "tokens.bin"
        dtype = np.dtype(self._meta["dtype"])
        if path.stat().st_size != len(self) * dtype.itemsize:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes instead of {len(self) * dtype.itemsize:,}; "
                f"delete {self.folder.parent} and run again"
            )
        return np.memmap(path, dtype, "r")

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1]: where each document starts; the last is the number of tokens."""
        return np.load(self.folder / "starts.npy")

    @property
    def eos_id(self) -> int:
        return self._meta["eos_id"]

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that became `tokens`."""
        return self._meta["text_bytes"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, ends of documents counted as tokens."""
        return self.text_bytes / len(self)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenStore, (self.folder,))


def write_store(
    folder: Path, texts: Iterable[str], tokenizer: Tokenizer, eos_id: int, vocab_size: int
) -> None:
    """Tokenise `texts` into `folder` in batches: memory does not grow with the text."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    starts, written, text_bytes = array.array("q", [0]), 0, 0
    with open(folder / "tokens.bin", "wb") as file:
        for batch in _batches(texts):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.asarray([*encoding.ids, eos_id], dtype)
                file.write(ids.tobytes())
                written += len(ids)
                starts.append(written)
            text_bytes += sum(len(text.encode()) for text in batch)
    np.save(folder / "starts.npy", np.asarray(starts, np.int64))
    meta = {"dtype": dtype.name, "eos_id": eos_id, "text_bytes": text_bytes}
    (folder / "store.json").write_text(json.dumps(meta))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in itertools.chain(texts, [None]):
        if batch and (
            text is None or size + len(text) > _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS
        ):
            yield batch
            batch, size = [], 0
        if text is not None:
            batch.append(text)
            size += len(text)
