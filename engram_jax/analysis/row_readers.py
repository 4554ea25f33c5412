"""Who reads a row: the n-grams of a text that an Engram layer's hash sends there, and how often.

Built from a text's n-grams once, then asked row by row. Memory is 4 bytes per different n-gram and
head, and 16 per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.analysis.usage import BLOCK, NgramCounts, rows_of

TEXT_BLOCK = 1 << 20  # tokens that are counted at a time


@dataclass(frozen=True)
class Readers:
    """Of one row. reads: tokens of the text that read it. total: different n-grams that do.
    windows: int32 [n, order], the most frequent of these in canonical ids, oldest id first; counts:
    int64 [n]."""

    reads: int
    total: int
    windows: np.ndarray
    counts: np.ndarray


class RowReaders:
    """The n-grams that read the rows of one layer.

    counts: of the text, by order (`usage.count_ngrams`).
    """

    def __init__(self, layer: LayerAddressing, counts: Mapping[int, NgramCounts]):
        self._layer, self._counts = layer, counts
        self._heads = [
            _Head(layer, head, counts[_order(layer, head)]) for head in range(layer.heads)
        ]

    def of(self, head: int, row: int, most: int) -> Readers:
        """The readers of a row of the table, at most `most` n-grams. head: 0 .. H - 1, whose row it
        is. Raises ValueError for a row that is another head's."""
        own, place = self._heads[head], row - self._layer.offsets[head]
        if not 0 <= place < self._layer.head_sizes[head]:
            raise ValueError(f"row {row} is none of head {head} of layer {self._layer.layer_id}")
        known = self._counts[_order(self._layer, head)]
        start, stop = own.starts[place], own.starts[place + 1]
        chosen = own.ngrams[start : min(stop, start + most)]
        reads, total = int(own.reads[place]), int(stop - start)
        return Readers(reads, total, known.windows[chosen], known.counts[chosen])


def _order(layer: LayerAddressing, head: int) -> int:
    return layer.orders[head // layer.heads_per_order]


class _Head:
    """ngrams: the text's, by the row they read and then by how often, most frequent first; those of
    row r stand from starts[r] to starts[r + 1]. reads: tokens that read a row."""

    def __init__(self, layer: LayerAddressing, head: int, counts: NgramCounts):
        size, column = layer.head_sizes[head], head % layer.heads_per_order
        windows = counts.windows
        parts = [
            rows_of(layer, counts.order, windows[start : start + BLOCK])[:, column]
            for start in range(0, max(len(windows), 1), BLOCK)
        ]
        rows = np.concatenate(parts) - layer.offsets[head]
        self.ngrams = np.lexsort((-counts.counts, rows)).astype(np.int32)
        self.starts = np.append(0, np.bincount(rows, minlength=size).cumsum())
        self.reads = np.bincount(rows, weights=counts.counts, minlength=size).astype(np.int64)


def text_blocks(
    tokens: np.ndarray, starts: np.ndarray, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first documents of a text, some at a time, as `usage.count_ngrams` takes them: (tokens,
    segments) int32 [1, n]; no document is cut but the last.

    tokens: [N]. starts: int64 [documents + 1], where each starts, then N. most: tokens altogether.
    """
    first, end = 0, min(most, int(starts[-1]))
    while starts[first] < end:
        last = int(np.searchsorted(starts, starts[first] + TEXT_BLOCK))
        last = min(max(last, first + 1), len(starts) - 1)
        stop = min(int(starts[last]), end)
        block = np.asarray(tokens[starts[first] : stop], np.int32)
        segments = np.searchsorted(starts[first:], np.arange(starts[first], stop), "right")
        yield block[None], segments.astype(np.int32)[None]
        first = last
