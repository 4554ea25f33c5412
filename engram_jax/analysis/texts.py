"""The text that an analysis reads: documents packed as in training, a few sequences at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.addressing import Addressing, LayerAddressing
from engram_jax.analysis.usage import NgramCounts, count_ngrams
from engram_jax.config import Config
from engram_jax.data.array_store import Store
from engram_jax.data.long_documents import Sequences
from engram_jax.data.packing import Batch, PackedSequences
from engram_jax.data.pipeline import trained_sequences
from engram_jax.data.prepared import PreparedData
from engram_jax.model.program import Program

COUNTED = 1 << 18  # tokens whose n-grams are counted at a time
ACTIVATIONS = 1 << 28  # bytes of a device that a batch may take beside the weights, about


@dataclass(frozen=True)
class TextBatches:
    """Sequences of a text, B at a time, as often as they are asked for.

    numbers: which sequences, ascending. size: B; the last batch is filled with padding.
    """

    sequences: PackedSequences
    numbers: np.ndarray
    size: int

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding not counted."""
        ends = np.minimum((self.numbers + 1) * self.sequences.seq_len, len(self.sequences.store))
        return int((ends - self.numbers * self.sequences.seq_len).sum())

    def __iter__(self) -> Iterator[Batch]:
        beyond = len(self.sequences)  # a number that gives padding
        for start in range(0, len(self.numbers), self.size):
            chosen = self.numbers[start : start + self.size]
            yield self.sequences.batch([*chosen, *[beyond] * (self.size - len(chosen))])

    def with_places(self, positions: np.ndarray) -> Iterator[tuple[Batch, list[np.ndarray]]]:
        """Every batch, and for each of its sequences the places of those of the store's tokens in
        it. positions: int64 ascending."""
        length = self.sequences.seq_len
        for first, batch in zip(range(0, len(self.numbers), self.size), self, strict=True):
            chosen = self.numbers[first : first + self.size]
            bounds = np.searchsorted(positions, np.stack([chosen, chosen + 1]) * length).T
            found = [positions[a:b] - n * length for n, (a, b) in zip(chosen, bounds, strict=True)]
            none = [np.zeros(0, np.int64)] * (self.size - len(chosen))
            yield batch, [*found, *none]


def batches_of(
    store: Store,
    config: Config,
    *,
    most: int | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> TextBatches:
    """The sequences of a store in batches of config.data's form, the last one padded.

    most: at most about so many tokens, in sequences spread evenly over the text. numbers: these
      sequences instead.
    """
    data = config.data
    sequences = PackedSequences(store, data.seq_len, config.tokenizer.pad_id, pad_tail=True)
    if numbers is None:
        count = len(sequences)
        if most is not None:
            count = min(count, max(1, most // data.seq_len))
        numbers = spread(len(sequences), count)
    return TextBatches(sequences, np.asarray(numbers, np.int64), data.batch_size)


def hashed_layers(addressing: Addressing) -> list[LayerAddressing]:
    """The Engram layers whose rows stand for hashes of n-grams; all of them hash the same ones."""
    return [layer for layer in addressing.layers.values() if isinstance(layer, LayerAddressing)]


def ngrams_of(
    addressing: Addressing, sequences: Sequences, numbers: np.ndarray
) -> dict[int, NgramCounts]:
    """The n-grams of sequences by order, as Engram layers read them. numbers: int64 [n], which."""
    each = max(1, COUNTED // sequences.seq_len)
    batches = (
        sequences.batch(numbers[start : start + each]) for start in range(0, len(numbers), each)
    )
    texts = ((batch["tokens"], batch["segments"]) for batch in batches)
    return count_ngrams(addressing, hashed_layers(addressing)[0], texts)


@dataclass(frozen=True)
class TrainedNgrams:
    """The n-grams of the sequences that the first `steps` batches of training read, each sequence
    once. counts: by order. tokens: of these sequences, of the `there` that training has read."""

    counts: dict[int, NgramCounts]
    steps: int
    tokens: int
    there: int


def trained_ngrams(
    addressing: Addressing, prepared: PreparedData, config: Config, step: int, tokens: int
) -> TrainedNgrams:
    """Of a run at a step. tokens: at most about so many are counted."""
    data = config.data
    steps = min(step, max(1, tokens // (data.batch_size * data.seq_len)))
    sequences, numbers = trained_sequences(prepared, config, steps)
    there = len(trained_sequences(prepared, config, step)[1])
    counts = ngrams_of(addressing, sequences, numbers)
    return TrainedNgrams(counts, steps, len(numbers) * data.seq_len, there * data.seq_len)


def spread(there: int, wanted: int) -> np.ndarray:
    """`wanted` of the numbers 0 .. `there` - 1, evenly spaced, ascending; all, if that is fewer."""
    if wanted >= there:
        return np.arange(there)
    return (np.arange(wanted) * there + there // 2) // wanted


def with_batches(program: Program, size: int, length: int) -> Program:
    """The program for batches of `size` sequences of `length` tokens."""
    config = program.config
    data = dataclasses.replace(config.data, batch_size=size, seq_len=length)
    mesh = dataclasses.replace(config.mesh, distinct=0.0)  # was measured on batches of another size
    return dataclasses.replace(program, config=dataclasses.replace(config, data=data, mesh=mesh))


def batch_shape(config: Config, shards: int, seq_len: int) -> tuple[int, int]:
    """(B, T) of batches that take about `ACTIVATIONS` bytes of a device at most: fewer sequences
    than in training, and shorter ones where one does not fit. B is a multiple of `shards`, the
    mesh's shards of a batch; T is at most `seq_len`."""
    length = seq_len
    while length > 128 and _bytes(config, length) > ACTIVATIONS:
        length //= 2
    each = max(1, ACTIVATIONS // _bytes(config, length))
    return shards * max(1, min(config.data.batch_size // shards, each)), length


def _bytes(config: Config, length: int) -> int:
    """About what a sequence takes: the states of all layers, several copies of the streams, rows,
    the widest feed-forward layer, and the scores of a quarter of attention's queries."""
    model, ffn = config.model, config.model.ffn
    width = model.d_model * (model.layers + 8 * model.hyper.streams)
    width += 4 * model.engram.d_mem * max(1, len(model.engram.layers))
    experts = (ffn.top_k + ffn.shared_experts) * ffn.expert_dim
    width += 4 * max(ffn.dense_dim, experts if ffn.routed_experts else 0)
    return 4 * length * (width + 3 * model.attention.heads * max(length // 4, 128))
