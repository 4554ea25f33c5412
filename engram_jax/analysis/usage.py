"""How a text uses a memory: hits per row, n-grams that share rows, Zipf's exponent, dead rows.

Everything is counted from the addressing alone, exactly; no table is read. Memory is 4 bytes per
row and some tens of bytes per different n-gram, whatever the text's length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engram_jax.addressing import Addressing
from engram_jax.addressing.hash_numpy import addresses, canonicalise, lookback
from engram_jax.addressing.hash_plan import LayerAddressing

BLOCK = 1 << 17  # different n-grams that are hashed at a time


@dataclass(frozen=True)
class HeadUsage:
    """One head of one order. rows: p of them, at `offset` of the table. touched: rows that the text
    reads. sharing: different n-grams whose row is another's, too. expected_sharing: their number
    if rows were drawn at random."""

    order: int
    offset: int
    rows: int
    touched: int
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


@dataclass
class NgramCounts:
    """The different n-grams of a text in canonical ids, as an Engram layer reads them.

    windows: int32 [n, order], oldest id first, in ascending order. counts: int64 [n].
    """

    order: int
    windows: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.windows = np.zeros((0, self.order), np.int32)
        self.counts = np.zeros(0, np.int64)

    def add(self, windows: np.ndarray) -> None:
        """windows: int32 [n, order]."""
        both = np.concatenate([self.windows, windows.astype(np.int32)])
        weights = np.concatenate([self.counts, np.ones(len(windows), np.int64)])
        order = np.lexsort(both.T[::-1])
        both, weights = both[order], weights[order]
        first = np.ones(len(both), bool)
        first[1:] = (both[1:] != both[:-1]).any(axis=1)
        starts = np.flatnonzero(first)
        self.windows = both[starts]
        self.counts = np.add.reduceat(weights, starts) if len(starts) else weights

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


def usage(layer: LayerAddressing, counts: NgramCounts) -> OrderUsage:
    """What the n-grams of one order do with a layer's heads."""
    order, total = counts.order, len(counts.windows)
    first = layer.orders.index(order) * layer.heads_per_order
    rows = np.concatenate(
        [
            rows_of(layer, order, counts.windows[start : start + BLOCK])
            for start in range(0, max(total, 1), BLOCK)
        ]
    )
    heads = []
    for j in range(layer.heads_per_order):
        size, offset = layer.head_sizes[first + j], layer.offsets[first + j]
        readers = np.bincount(rows[:, j] - offset, minlength=size)
        alone = (1 - 1 / size) ** (total - 1) if total else 1.0
        heads.append(
            HeadUsage(
                order=order,
                offset=int(offset),
                rows=size,
                touched=int((readers > 0).sum()),
                sharing=int(readers[readers > 1].sum()),
                expected_sharing=total * (1 - alone),
            )
        )
    _, inverse, readers = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    inseparable = int((readers[inverse.reshape(-1)] > 1).sum())
    positions = int(counts.counts.sum())
    return OrderUsage(order, total, positions, zipf(counts.counts), inseparable, tuple(heads))


def zipf(counts: np.ndarray) -> float:
    """s of count = c * rank**-s: least squares of the logarithms at ranks evenly spaced in their
    logarithm, so that the many rare ones do not decide alone. NaN of fewer than ten."""
    if len(counts) < 10:
        return float("nan")
    ordered = np.sort(counts)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 50).round().astype(np.int64))
    slope, _ = np.polyfit(np.log(ranks), np.log(ordered[ranks - 1]), 1)
    return float(-slope)
