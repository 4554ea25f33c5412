"""Training sequences in which documents longer than a sequence stay long.

A document of more than T tokens is cut from its beginning into whole sequences of T tokens, each
with this document alone; what remains of it is packed with the short documents (packing.py). So a
sequence has one document wherever there is one that fills it, and still every token but the first
of a document is the target of exactly one position of exactly one sequence (but the short tail).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engram_jax.config.errors import UserError
from engram_jax.config.schema import Config
from engram_jax.data.array_store import Store
from engram_jax.data.packing import Batch, PackedSequences


@dataclass(frozen=True)
class _Rest:
    """Pieces of a store as a store of their own, each a document: [begins[i], ends[i])."""

    store: Store
    begins: np.ndarray
    ends: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [pieces + 1]."""
        return np.concatenate([[0], np.cumsum(self.ends - self.begins)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def tokens(self) -> _Rest:
        return self

    def __getitem__(self, at: slice) -> np.ndarray:
        """The tokens from `at.start` to `at.stop`, which are in it."""
        first = int(np.searchsorted(self.starts, at.start, "right")) - 1
        parts: list[np.ndarray] = []
        while self.starts[first] < at.stop:
            low = max(0, at.start - int(self.starts[first]))
            high = min(at.stop, int(self.starts[first + 1])) - int(self.starts[first])
            begin = int(self.begins[first])
            parts.append(np.asarray(self.store.tokens[begin + low : begin + high]))
            first += 1
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


@dataclass(frozen=True)
class LongSequences:
    """The sequences of a token store: first those that are whole parts of long documents, then the
    packed rest. The interface is that of `PackedSequences`."""

    store: Store
    seq_len: int
    pad_id: int

    @cached_property
    def _whole(self) -> np.ndarray:
        """int64 [documents]: how many whole sequences a document fills, the target of its last
        position included."""
        return np.maximum(np.diff(self.store.starts) - 1, 0) // self.seq_len

    @cached_property
    def _begins(self) -> np.ndarray:
        """int64 [sequences]: where they begin in the store."""
        first = np.cumsum(self._whole) - self._whole
        number = np.arange(self._whole.sum()) - np.repeat(first, self._whole)
        return np.repeat(self.store.starts[:-1], self._whole) + number * self.seq_len

    @cached_property
    def _packed(self) -> PackedSequences:
        begins = self.store.starts[:-1] + self._whole * self.seq_len
        ends = self.store.starts[1:]
        keep = ends - begins > 1  # one token predicts nothing, and is predicted by no other here
        rest = _Rest(self.store, begins[keep], ends[keep])
        return PackedSequences(rest, self.seq_len, self.pad_id)  # type: ignore[arg-type]

    @property
    def long(self) -> int:
        """How many sequences are whole parts of long documents."""
        return len(self._begins)

    def __len__(self) -> int:
        return self.long + len(self._packed)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """As `PackedSequences.batch`."""
        numbers = np.asarray(numbers, np.int64)
        # The number of no sequence gives a row of padding, which a long one then overwrites.
        packed = np.where(numbers < self.long, len(self._packed), numbers - self.long)
        batch = self._packed.batch(packed)
        for row in np.flatnonzero(numbers < self.long):
            start = int(self._begins[numbers[row]])
            tokens = np.asarray(self.store.tokens[start : start + self.seq_len + 1])
            batch["tokens"][row], batch["targets"][row] = tokens[:-1], tokens[1:]
            batch["loss_mask"][row], batch["segments"][row] = 1, 1
            batch["positions"][row] = np.arange(self.seq_len)
        return batch


Sequences = PackedSequences | LongSequences


def train_sequences(store: Store, config: Config) -> Sequences:
    """The sequences to train on, in the order of the text. Raises UserError if the configuration
    asks for long documents and there is none, or nothing else."""
    data, pad = config.data, config.tokenizer.pad_id
    if not data.keep_long:
        return PackedSequences(store, data.seq_len, pad)
    sequences = LongSequences(store, data.seq_len, pad)
    if data.long_share and not 0 < sequences.long < len(sequences):
        what = "nothing else" if sequences.long else "no document that is so long"
        raise UserError(
            f"config.data.long_share = {data.long_share}: of sequences that one document fills"
            f" (config.data.seq_len = {data.seq_len}), but the training text has {what}: must be 0"
        )
    return sequences
