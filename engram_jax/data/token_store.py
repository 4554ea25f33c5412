"""Stores a tokenised split: one flat array of token ids on disk, and where each document starts."""

from __future__ import annotations

import array
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram_jax.addressing.tokenizer import encode_batch, unknown_id
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import load_array, read_json
from engram_jax.hardware.storage import write_text

_BATCH_BYTES = 4 << 20  # text handed to the tokenizer's threads at a time
_BATCH_DOCUMENTS = 1024
_SIZES = "token_bytes.npy"
_MOST_UNKNOWN = 0.5  # of the tokens
_CHECKED = 1 << 24  # bytes of tokens.bin whose checksum is computed at a time


@dataclass(frozen=True)
class TokenStore:
    """Token ids of a split's documents, each followed by the end-of-document id, memory-mapped.

    folder: has tokens.bin, starts.npy and store.json. A pickled copy opens it again.
    All properties raise UserError for files that are missing or damaged.
    """

    folder: Path

    @cached_property
    def _meta(self) -> dict[str, Any]:
        path = self.folder / "store.json"
        try:
            meta = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; {self._remedy}") from error
        whole = all(type(meta.get(key)) is int for key in ("eos_id", "text_bytes"))
        if meta.get("dtype") not in ("uint16", "uint32") or not whole:
            raise self._damaged(path, "does not describe a token store")
        return meta

    @property
    def _remedy(self) -> str:
        return f"delete {shown(self.folder.parent)} and run again"

    def _damaged(self, path: Path, what: str) -> UserError:
        return UserError(f"{shown(path)}: {what}; {self._remedy}")

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [tokens]: all documents, concatenated."""
        path, dtype = self.folder / "tokens.bin", np.dtype(self._meta["dtype"])
        found, wanted = path.stat().st_size, len(self) * dtype.itemsize
        if found != wanted:
            raise self._damaged(path, f"{found:,} bytes instead of {wanted:,}")
        return np.memmap(path, dtype, "r")

    def verify(self) -> None:
        """Compare tokens and starts with their CRC-32s, reading them once. Raises UserError.

        Stores of earlier versions have none.
        """
        for name, values in (("tokens.bin", self.tokens), ("starts.npy", self.starts)):
            stored = self._meta.get(name)
            if stored is not None and stored != crc32(values):
                raise self._damaged(self.folder / name, "damaged, its CRC-32 is not the stored one")

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1]: where each document starts; the last is the number of tokens."""
        path = self.folder / "starts.npy"
        try:
            starts = load_array(path)
        except UserError as error:
            raise UserError(f"{error}; {self._remedy}") from error
        rising = starts.ndim == 1 and starts.dtype == np.int64 and starts.size > 0
        if not rising or starts[0] != 0 or (np.diff(starts) < 1).any():
            raise self._damaged(path, "damaged, documents do not follow each other")
        return starts

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

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [tokens]: bytes of the text that each token stands for, 0 for ends of documents
        (`bytes_of_tokens`). Of a store that was written with them."""
        path = self.folder / _SIZES
        sizes = load_array(path)
        if sizes.shape != (len(self),) or int(sizes.sum(dtype=np.int64)) != self.text_bytes:
            raise self._damaged(path, "damaged, does not add up to the text")
        return sizes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, ends of documents counted as tokens."""
        return self.text_bytes / len(self)

    @property
    def unknown_tokens(self) -> int:
        """Tokens that stand for what the tokenizer does not know; stores of earlier versions say
        0."""
        return self._meta.get("unknown_tokens", 0)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenStore, (self.folder,))


def write_store(
    folder: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    eos_id: int,
    vocab_size: int,
    *,
    text_of_tokens: bool = False,
) -> None:
    """Tokenise `texts` into `folder` in batches: memory does not grow with the text.

    text_of_tokens: write how many bytes of the text each token stands for, too
    (`TokenStore.token_bytes`), which takes 4 bytes of memory for each.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    sizes: list[np.ndarray] = []
    starts, written, text_bytes, checksum = array.array("q", [0]), 0, 0, 0
    unknown, unknown_token = 0, unknown_id(tokenizer)
    with open(folder / "tokens.bin", "wb") as file:
        for batch in _batches(texts):
            found = encode_batch(tokenizer, batch, offsets=text_of_tokens)
            for text, encoding in zip(batch, found, strict=True):
                ids = np.asarray([*encoding.ids, eos_id], dtype)
                if text_of_tokens:
                    sizes.append(bytes_of_tokens(text, encoding.offsets))
                if unknown_token is not None:
                    unknown += int(np.count_nonzero(ids == unknown_token))
                file.write(ids.tobytes())
                checksum = zlib.crc32(ids.data, checksum)
                written += len(ids)
                starts.append(written)
            text_bytes += sum(len(text.encode()) for text in batch)
            if unknown > _MOST_UNKNOWN * written:
                raise UserError(
                    f"the tokenizer knows too little of this text: {unknown / written:.0%} of the"
                    " tokens are its unknown token; give one that is made for such text"
                    " (config.tokenizer.path)"
                )
    places = np.asarray(starts, np.int64)
    np.save(folder / "starts.npy", places)
    if text_of_tokens:
        np.save(folder / _SIZES, np.concatenate([np.zeros(0, np.int32), *sizes]))
    meta = {"dtype": dtype.name, "eos_id": eos_id, "text_bytes": text_bytes}
    meta |= {"unknown_tokens": unknown, "tokens.bin": checksum, "starts.npy": crc32(places)}
    write_text(folder / "store.json", json.dumps(meta))


def bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many UTF-8 bytes of a text each of its tokens stands for, int32 [tokens + 1]; the last is
    of the token that ends the document. Their sum is the text's.

    offsets: a token's characters, as the tokenizer tells them of the text as it was given. Of a
    character that several tokens spell (an emoji in byte-level BPE) the first has all bytes. What
    no token spells (blanks that a normaliser strips) belongs to the token behind it, at the end to
    the last one; a text without a token to the end.
    """
    sizes = np.zeros(len(offsets) + 1, np.int32)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + sum((characters >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    until = np.concatenate([[0], np.cumsum(width)])
    if not len(offsets):
        sizes[-1] = until[-1]
        return sizes
    ends = np.maximum.accumulate(np.asarray(offsets, np.int64)[:, 1])
    ends[-1] = len(characters)
    sizes[:-1] = np.diff(until[ends], prepend=0)
    return sizes


def crc32(values: np.ndarray) -> int:
    """CRC-32 of an array's bytes, a part at a time: it may be mapped from a file."""
    step, checksum = max(1, _CHECKED // values.itemsize), 0
    for start in range(0, values.size, step):
        checksum = zlib.crc32(np.ascontiguousarray(values[start : start + step]).data, checksum)
    return checksum


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
