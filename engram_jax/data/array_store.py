"""Documents that are arrays of token ids in memory, where a token store is read otherwise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from engram_jax.config.errors import UserError, shown
from engram_jax.data.token_store import TokenStore


@dataclass(frozen=True, eq=False)
class ArrayStore:
    """Token ids of documents, as the arrays of a `TokenStore`.

    tokens: int32 [tokens], all documents, concatenated. starts: int64 [documents + 1].
    """

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @property
    def bytes_per_token(self) -> float:
        """Not known: there is no text."""
        return math.nan

    @property
    def unknown_tokens(self) -> int:
        return 0

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    @cached_property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of ids and documents: equal for equal documents in order."""
        sha = hashlib.sha256(np.ascontiguousarray(self.starts, "<i8").tobytes())
        sha.update(np.ascontiguousarray(self.tokens, "<i4").tobytes())
        return sha.hexdigest()[:32]


Store = TokenStore | ArrayStore


def array_store(documents: Sequence[Any] | np.ndarray, vocab_size: int) -> ArrayStore:
    """The store of documents, each whole numbers [n] below `vocab_size`, n at least 1.

    Raises UserError naming the document that is not.
    """
    if isinstance(documents, str | bytes) or not hasattr(documents, "__len__"):
        raise UserError("documents: must be a list of documents, each an array of token ids")
    arrays = [_ids(document, number, vocab_size) for number, document in enumerate(documents)]
    if not arrays:
        raise UserError("documents: there is none; give at least one array of token ids")
    starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return ArrayStore(np.concatenate(arrays), starts)


def _ids(document: Any, number: int, vocab_size: int) -> np.ndarray:
    name = f"documents[{number}]"
    try:
        ids = np.asarray(document)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{name}: must be token ids, a whole number each") from error
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or not ids.size:
        what = shown(document, quoted=True, most=60) if isinstance(document, str) else ""
        found = what or f"{ids.dtype} of shape {list(ids.shape)}"
        raise UserError(f"{name}: is {found}; must be token ids, whole numbers [n], n at least 1")
    if wrong := next((int(i) for i in (ids.min(), ids.max()) if not 0 <= i < vocab_size), None):
        raise UserError(f"{name}: token id {wrong}: must be from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)
