"""How a text uses a memory: hits per row, n-grams that share rows, Zipf's exponent, dead rows.

Everything is counted from the addressing alone, exactly; no table is read. Memory is 8 bytes per
row of a head and about a hundred bytes per different n-gram, whatever the text's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from engram_jax.addressing import Addressing
from engram_jax.addressing.hash_numpy import addresses, canonicalise, lookback
from engram_jax.addressing.hash_plan import LayerAddressing

BLOCK = 1 << 17  # different n-grams that are hashed at a time
BANDS = (0, 1, 2, 4, 16, 64, 256)  # lowest counts of the bands that n-grams and rows are put in
_MERGED = 1 << 18  # n-grams that are merged at a time, at least


@dataclass(frozen=True)
class HeadUsage:
    """One head of one order. rows: p of them, at `offset` of the table. touched: rows that the text
    reads. hits: rows by how often the text reads them, as many as fall into each of `BANDS`.
    sharing: different n-grams whose row is another's, too. expected_sharing: their number if rows
    were drawn at random."""

    order: int
    offset: int
    rows: int
    touched: int
    hits: tuple[int, ...]
    sharing: int
    expected_sharing: float

    @property
    def dead(self) -> float:
        """The share of rows that the text never reads."""
        return 1 - self.touched / self.rows


@dataclass(frozen=True)
class OrderUsage:
    """One order of one layer. ngrams: different ones. positions: tokens that read one. zipf: s of
    count ~ rank**-s over the different n-grams, NaN of fewer than ten. inseparable: different
    n-grams that share the rows of all heads with another one."""

    order: int
    ngrams: int
    positions: int
    zipf: float
    inseparable: int
    heads: tuple[HeadUsage, ...]


class NgramCounts:
    """The different n-grams of a text in canonical ids, as an Engram layer reads them."""

    def __init__(self, order: int):
        self.order = order
        self._windows = np.zeros((0, order), np.int32)
        self._counts = np.zeros(0, np.int64)
        self._new: list[np.ndarray] = []

    @property
    def windows(self) -> np.ndarray:
        """int32 [n, order], oldest id first, in ascending order."""
        self._merge()
        return self._windows

    @property
    def counts(self) -> np.ndarray:
        """int64 [n]."""
        self._merge()
        return self._counts

    def add(self, windows: np.ndarray) -> None:
        """windows: int32 [n, order]."""
        self._new.append(windows.astype(np.int32))
        # As many as there are already: each n-gram is sorted a few times, not once per batch.
        if sum(map(len, self._new)) >= max(_MERGED, len(self._windows)):
            self._merge()

    def _merge(self) -> None:
        if not self._new:
            return
        new = np.concatenate(self._new)
        self._new = []
        both = np.concatenate([self._windows, new])
        weights = np.concatenate([self._counts, np.ones(len(new), np.int64)])
        order = np.lexsort(both.T[::-1])
        both, weights = both[order], weights[order]
        first = np.ones(len(both), bool)
        first[1:] = (both[1:] != both[:-1]).any(axis=1)
        starts = np.flatnonzero(first)
        self._windows = both[starts]
        self._counts = np.add.reduceat(weights, starts) if len(starts) else weights

    def of(self, windows: np.ndarray) -> np.ndarray:
        """How often n-grams were counted: int [..., order] -> int64 [...]."""
        if not len(self.windows):
            return np.zeros(windows.shape[:-1], np.int64)
        known, asked = _keys(self.windows), _keys(windows.reshape(-1, self.order))
        at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
        found = np.where(known[at] == asked, self.counts[at], 0)
        return found.reshape(windows.shape[:-1])


def _keys(windows: np.ndarray) -> np.ndarray:
    """A fixed-width byte string for each n-gram [n, order]; they sort as the n-grams do."""
    ids = np.ascontiguousarray(windows, ">u4")
    return ids.view(f"S{4 * windows.shape[1]}").reshape(-1)


def count_ngrams(
    addressing: Addressing, layer: LayerAddressing, texts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> dict[int, NgramCounts]:
    """By order. texts: (raw tokens, segments) int32 [rows, T], segment 0 is padding."""
    found = {order: NgramCounts(order) for order in layer.orders}
    for tokens, segments in texts:
        canonical = canonicalise(tokens, addressing.compression)
        back = lookback(canonical, layer, segments)
        real = (segments > 0) & (canonical >= 0)
        for order, counts in found.items():
            windows = np.stack([ids[real] for ids in back[:order][::-1]], axis=1)
            counts.add(windows)
    return found


def rows_of(layer: LayerAddressing, order: int, windows: np.ndarray) -> np.ndarray:
    """The rows that n-grams read, int32 [n, heads of an order]. windows: int [n, order]."""
    first = layer.orders.index(order) * layer.heads_per_order
    heads = slice(first, first + layer.heads_per_order)
    # The last token of a text that is the n-gram; lower orders' windows are filled on the left.
    return addresses(windows, layer)[:, -1, heads].astype(np.int32)


def rows_of_all(layer: LayerAddressing, counts: NgramCounts) -> np.ndarray:
    """The rows that all n-grams of an order read, int32 [n, heads of an order]."""
    starts = range(0, max(len(counts.windows), 1), BLOCK)
    blocks = [counts.windows[start : start + BLOCK] for start in starts]
    return np.concatenate([rows_of(layer, counts.order, block) for block in blocks])


def usage(layer: LayerAddressing, counts: NgramCounts) -> OrderUsage:
    """What the n-grams of one order do with a layer's heads."""
    order, total = counts.order, len(counts.windows)
    first = layer.orders.index(order) * layer.heads_per_order
    rows = rows_of_all(layer, counts)
    heads = []
    for j in range(layer.heads_per_order):
        size, offset = layer.head_sizes[first + j], layer.offsets[first + j]
        readers = np.bincount(rows[:, j] - offset, minlength=size)
        read = np.bincount(rows[:, j] - offset, counts.counts, minlength=size)
        alone = (1 - 1 / size) ** (total - 1) if total else 1.0
        heads.append(
            HeadUsage(
                order=order,
                offset=int(offset),
                rows=size,
                touched=int((readers > 0).sum()),
                hits=tuple(np.bincount(band_of(read), minlength=len(BANDS)).tolist()),
                sharing=int(readers[readers > 1].sum()),
                expected_sharing=total * (1 - alone),
            )
        )
    _, inverse, readers = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    inseparable = int((readers[inverse.reshape(-1)] > 1).sum())
    positions = int(counts.counts.sum())
    return OrderUsage(order, total, positions, zipf(counts.counts), inseparable, tuple(heads))


def band_of(counts: np.ndarray) -> np.ndarray:
    """Which of `BANDS` counts fall into: int64, of the same shape."""
    return np.searchsorted(BANDS, counts, side="right") - 1


def band_name(low: int, high: float) -> str:
    """Of the counts `low` to `high` - 1."""
    if high == low + 1:
        return "never" if low == 0 else "once" if low == 1 else f"{low} times"
    return f"{low} times and more" if high == np.inf else f"{low} to {int(high) - 1} times"


def hits(layer: LayerAddressing, ngrams: Mapping[int, NgramCounts]) -> np.ndarray:
    """How often each row of a layer's table is read: int64 [R]. ngrams: of its orders."""
    found = np.zeros(layer.rows, np.int64)
    for order, counts in ngrams.items():
        for start in range(0, len(counts.windows), BLOCK):
            block = slice(start, start + BLOCK)
            rows = rows_of(layer, order, counts.windows[block])
            each = np.broadcast_to(counts.counts[block, None], rows.shape)
            np.add.at(found, rows, each)
    return found


def rank_curve(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ranks from 1, counts there), int64: about 50 ranks evenly spaced in their logarithm."""
    if not len(counts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ordered = np.sort(counts)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 50).round().astype(np.int64))
    return ranks, ordered[ranks - 1]


def zipf(counts: np.ndarray) -> float:
    """s of count = c * rank**-s: least squares of the logarithms at ranks evenly spaced in their
    logarithm, so that the many rare ones do not decide alone. NaN of fewer than ten."""
    if len(counts) < 10:
        return float("nan")
    ranks, there = rank_curve(counts)
    slope, _ = np.polyfit(np.log(ranks), np.log(there), 1)
    return float(-slope)
