"""Packs documents into sequences by concatenating and splitting, with random access.

Sequence i reads tokens [i T, i T + T] of the flat store: T inputs, and the same shifted by one as
targets. So every token but the very first is the target of exactly one position of exactly one
sequence, and counts in the loss unless it is the first of its document, which nothing predicts. The
tail that does not fill a sequence (fewer than T targets) is dropped for training and padded for
validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.data.array_store import Store

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackedSequences:
    """The sequences of a token store, or of arrays in its form (array_store.py).

    pad_tail: the last, shorter sequence is kept and padded with `pad_id`, instead of dropped.
    """

    store: Store
    seq_len: int
    pad_id: int
    pad_tail: bool = False

    def __len__(self) -> int:
        """Number of sequences."""
        targets = max(0, len(self.store) - 1)
        return -(-targets // self.seq_len) if self.pad_tail else targets // self.seq_len

    def targets(self, count: int | None = None) -> int:
        """Targets of the first `count` sequences (None: all): all but documents' first tokens."""
        count = len(self) if count is None else min(count, len(self))
        end = min(len(self.store), count * self.seq_len + 1)
        return end - int(np.searchsorted(self.store.starts[:-1], end))

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Sequences `numbers` as the arrays a training step reads; a number past the last sequence
        gives a row of padding.

        tokens, targets, segments, positions int32 [B, T]; loss_mask float32 [B, T]. segments count
        the documents within a sequence from 1, 0 is padding; positions restart at 0 with every
        document and every sequence; targets are 0 where loss_mask is 0.
        """
        numbers = np.asarray(numbers, np.int64)
        shape = (len(numbers), self.seq_len + 1)
        tokens = np.full(shape, self.pad_id, np.int32)
        first = np.zeros(shape, bool)  # the token is the first of its document
        real = np.zeros(shape, bool)
        for row, number in enumerate(numbers):
            start = int(number) * self.seq_len
            end = min(start + self.seq_len + 1, len(self.store))
            if number >= len(self):
                continue
            tokens[row, : end - start] = self.store.tokens[start:end]
            real[row, : end - start] = True
            low, high = np.searchsorted(self.store.starts[:-1], (start, end))
            first[row, self.store.starts[low:high] - start] = True
        counts = real[:, 1:] & ~first[:, 1:]
        real, here = real[:, :-1], first[:, :-1]
        at = np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), here.shape)
        positions = at - np.maximum.accumulate(np.where(here, at, 0), axis=1)
        here = here.copy()
        here[:, 0] = True  # a sequence starts a segment, wherever in a document it starts
        segments = np.cumsum(here, axis=1, dtype=np.int32)
        return {
            "tokens": tokens[:, :-1].copy(),
            "targets": np.where(counts, tokens[:, 1:], 0),
            "loss_mask": counts.astype(np.float32),
            "segments": np.where(real, segments, 0),
            "positions": np.where(real, positions, 0),
        }
