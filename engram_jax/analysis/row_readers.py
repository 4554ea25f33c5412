"""Who reads a row: the n-grams of a text that an Engram layer's hash sends there, and how often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_jax.addressing import Addressing
from engram_jax.addressing.compression import canonical_keys
from engram_jax.addressing.detokenizer import text_of
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.analysis.usage import NgramCounts, rows_of_all


@dataclass(frozen=True)
class Readers:
    """Of one row. reads: tokens of the text that read it. total: different n-grams that do.
    windows: int32 [n, order], the most frequent of these in canonical ids, oldest id first; counts:
    int64 [n], descending, equal ones in the order of their ids."""

    reads: int
    total: int
    windows: np.ndarray
    counts: np.ndarray


class RowReaders:
    """The n-grams that read the rows of one layer: built once, then asked row by row. Takes 4 bytes
    per different n-gram and 16 per row, of each head.

    counts: of the text, by order (`usage.count_ngrams`). heads: whose rows are asked for, indices
    0 .. H - 1; None = all.
    """

    def __init__(
        self,
        layer: LayerAddressing,
        counts: Mapping[int, NgramCounts],
        heads: Iterable[int] | None = None,
    ):
        self._layer, self._counts = layer, counts
        self._heads: dict[int, _Head] = {}
        wanted = set(range(layer.heads) if heads is None else heads)
        for i, order in enumerate(layer.orders):
            first = i * layer.heads_per_order
            mine = sorted(wanted & set(range(first, first + layer.heads_per_order)))
            if mine:
                rows = rows_of_all(layer, counts[order])
            for head in mine:
                own = rows[:, head - first] - layer.offsets[head]
                self._heads[head] = _Head(own, layer.head_sizes[head], counts[order].counts)

    def of(self, row: int, most: int) -> Readers:
        """The readers of a row of the table, at most `most` n-grams. Raises ValueError for a row
        that is not one of the heads'."""
        head = head_of(self._layer, row)
        if not 0 <= row < self._layer.rows or head not in self._heads:
            raise ValueError(f"row {row} is none of the heads' of layer {self._layer.layer_id}")
        own, place = self._heads[head], row - self._layer.offsets[head]
        known = self._counts[order_of(self._layer, row)]
        start, stop = own.starts[place], own.starts[place + 1]
        chosen = own.ngrams[start : min(stop, start + most)]
        reads, total = int(own.reads[place]), int(stop - start)
        return Readers(reads, total, known.windows[chosen], known.counts[chosen])


def head_of(layer: LayerAddressing, row: int) -> int:
    """Which head of a layer a row of its table belongs to."""
    return int(np.searchsorted(layer.offsets, row, side="right")) - 1


def order_of(layer: LayerAddressing, row: int) -> int:
    """The order of the n-grams that read a row."""
    return layer.orders[head_of(layer, row) // layer.heads_per_order]


class _Head:
    """ngrams: the text's, by the row they read and then by how often, most frequent first; those of
    row r stand from starts[r] to starts[r + 1]. reads: tokens that read a row."""

    def __init__(self, rows: np.ndarray, size: int, counts: np.ndarray):
        self.ngrams = np.lexsort((-counts, rows)).astype(np.int32)
        self.starts = np.append(0, np.bincount(rows, minlength=size).cumsum())
        self.reads = np.bincount(rows, weights=counts, minlength=size).astype(np.int64)


class CanonicalText:
    """Canonical ids as text: the key that its tokens share, or the token's text where raw ids are
    hashed; a lone space is ␣. fill_id: what is read before a document's start, shown as ⊢."""

    def __init__(self, addressing: Addressing, tokenizer: Any, fill_id: int):
        self._tokenizer, self._fill = tokenizer, fill_id
        self._keys: dict[int, str] = {}
        if addressing.compression is not None:
            pairs = zip(addressing.compression.tolist(), canonical_keys(tokenizer), strict=True)
            self._keys = dict(pairs)

    def __call__(self, window: Sequence[int] | np.ndarray) -> str:
        """An n-gram, oldest id first, with a dot between ids: "new·york"."""
        ids = [int(i) for i in window]
        before = next((k for k, i in enumerate(ids) if i != self._fill), len(ids))
        texts = [self._keys.get(i) or text_of(self._tokenizer, i) for i in ids[before:]]
        return "·".join(["⊢"] * before + ["␣" if text == " " else text for text in texts])
