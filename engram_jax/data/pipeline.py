"""The stream of global batches (Grain): shuffled, endless, read per process, resumable anywhere.

Global batch s is a function of (seed, s) alone: sequence numbers are reshuffled every epoch,
repeated, and split into batches of B; epochs follow each other without a gap, so a batch may
contain the end of one and the start of the next. A process then reads its own rows of it. Only the
numbers go through Grain's shuffle; tokens are read, packed and, if wanted, hashed to addresses in
the prefetching threads or processes. Seeking to batch s costs the same for every s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.data.long_documents import LongSequences, Sequences, train_sequences
from engram_jax.data.packing import Batch, PackedSequences
from engram_jax.data.prepared import PreparedData
from engram_jax.data.worker_process import belong_to_parent

# (tokens int32 [b, T], segments int32 [b, T]) -> {layer id: flat rows int32 [b, T, H]}.
AddressesFn = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]

_NO_LEAK = "ignore:resource_tracker"
_THREADS = 2
_PREFETCH = 8  # batches
# As good as endless. Grain's own endless length, sys.maxsize, overflows with batches of one.
_ENDLESS = 1 << 50  # sequences


@dataclass(frozen=True)
class _ReadRows:
    """Sequence numbers of a global batch [B] -> this process's rows as a batch."""

    sequences: Sequences
    rows: np.ndarray | slice
    addresses_fn: AddressesFn | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        belong_to_parent()  # unpickled: this is a worker process
        self.__dict__.update(state)

    def __call__(self, numbers: np.ndarray) -> Batch:
        batch = self.sequences.batch(np.asarray(numbers)[self.rows])
        if self.addresses_fn is not None:
            batch["addresses"] = self.addresses_fn(batch["tokens"], batch["segments"])  # type: ignore
        return batch


class TrainIterator(Iterator[Batch]):
    """Endless batches for one process; see `train_batches`.

    `get_state()` is a small dict of plain values, equal on every process and for any number of
    processes; `set_state()` seeks without reading the batches before.
    """

    def __init__(self, batches: grain.MapDataset, identity: dict[str, Any], workers: int) -> None:
        self._batches = batches
        self._identity = identity
        self._workers = workers
        self._start(0)

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, and the identity of the data."""
        return {"next_batch": self._next_batch, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of `get_state`. Raises UserError if it belongs to other data, or to
        batches of another shape or seed."""
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                what = "data settings"
                if key == "data":  # a fingerprint
                    what = "text and tokenizer (the embedded text changes with the Python version)"
                raise UserError(
                    f"the stored position in the data has {key} = {state.get(key)!r}, this run has "
                    f"{mine!r}; resume with the same {what}, or start a new run with another "
                    "--workdir"
                )
        self.close()
        self._start(int(state["next_batch"]))

    def close(self) -> None:
        """Stop prefetching."""
        self._iterator.close()

    def _start(self, next_batch: int) -> None:
        self._next_batch = next_batch
        batches = self._batches.slice(slice(next_batch, None))
        if self._workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # Grain's processes read absl flags; a notebook parses none
                flags.FLAGS.mark_as_parsed()
            # What is prefetched when it ends, Python's tracker of shared memory removes, warning of
            # a leak; the tracker and the workers take their filters from here.
            if _NO_LEAK not in sys.warnoptions:
                sys.warnoptions.append(_NO_LEAK)
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
            processes = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            stream = batches.to_iter_dataset(options).mp_prefetch(processes)
        else:
            options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
            stream = batches.to_iter_dataset(options)
        self._iterator = iter(stream)


def train_batches(
    prepared: PreparedData,
    config: Config,
    rows: np.ndarray | None = None,
    addresses_fn: AddressesFn | None = None,
) -> TrainIterator:
    """Endless training batches, or some rows of each (see the module; arrays: data/packing.py).

    rows: which of the B rows this process reads, in this order; None = all.
    addresses_fn: adds batch["addresses"]; must be picklable if config.data.workers > 0.
    Raises UserError when the store has less than one batch.
    """
    data, store = config.data, prepared.store_train
    sequences = train_sequences(store, config)
    if len(sequences) < data.batch_size:
        raise UserError(
            f"the training text has {len(store):,} tokens = {len(sequences):,} sequences of "
            f"config.data.seq_len = {data.seq_len}, fewer than config.data.batch_size = "
            f"{data.batch_size}; give more text or make one of them smaller"
        )
    batches = (
        _numbers(sequences, config)
        .batch(data.batch_size)
        .map(_ReadRows(sequences, slice(None) if rows is None else rows, addresses_fn))
    )
    identity = {
        "data": prepared.fingerprint,
        "seed": data.seed,
        "batch_size": data.batch_size,
        "seq_len": data.seq_len,
    }
    if data.keep_long:
        identity |= {"keep_long": True, "long_share": data.long_share}
    return TrainIterator(batches, identity, data.workers)


def _numbers(sequences: Sequences, config: Config) -> grain.MapDataset:
    """The sequence numbers in the order of training, endless."""
    parts = [_shuffled(part, config) for part in _parts(sequences, config)]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, _shares(config))


def _parts(sequences: Sequences, config: Config) -> list[range]:
    """The numbers that are shuffled together: all; or those of long documents, and the others."""
    if not (config.data.long_share and isinstance(sequences, LongSequences)):
        return [range(len(sequences))]
    return [range(sequences.long), range(sequences.long, len(sequences))]


def _shares(config: Config) -> list[float]:
    return [config.data.long_share, 1 - config.data.long_share]


def _shuffled(part: range, config: Config) -> grain.MapDataset:
    """Every epoch in another order, endless."""
    numbers = grain.MapDataset.range(part.start, part.stop).seed(config.data.seed).shuffle()
    return numbers.repeat(_ENDLESS // len(part))


def trained_sequences(
    prepared: PreparedData, config: Config, batches: int
) -> tuple[Sequences, np.ndarray]:
    """The training sequences, and which of them the first `batches` global batches contain: their
    numbers, int64 ascending, each once. All of them after an epoch."""
    sequences = train_sequences(prepared.store_train, config)
    parts, wanted = _parts(sequences, config), batches * config.data.batch_size
    counts = [wanted] if len(parts) == 1 else _drawn(wanted, _shares(config))
    found: list[int] = []
    for part, count in zip(parts, counts, strict=True):
        order = _shuffled(part, config)
        all_of_them = count >= len(part)
        found += part if all_of_them else [int(order[i]) for i in range(count)]
    return sequences, np.sort(np.asarray(found, np.int64))


def _drawn(wanted: int, shares: list[float]) -> list[int]:
    """How many of the first `wanted` draws are of each part."""
    numbers = grain.MapDataset.range(max(1, wanted))
    sources = [numbers.map(partial(_tagged, i)) for i in range(len(shares))]
    order, counts, at = grain.MapDataset.mix(sources, shares), [0] * len(shares), wanted
    while at and not all(counts):  # the last draw of each says how many there were
        at -= 1
        source, number = order[at]
        counts[source] = max(counts[source], number + 1)
    return counts


def _tagged(source: int, number: int) -> tuple[int, int]:
    return source, number


def validation_batches(
    prepared: PreparedData,
    config: Config,
    rows: np.ndarray | None = None,
    addresses_fn: AddressesFn | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The held-out sequences in their order, each once; the last batch is filled with padding.

    limit: the most global batches; None = all. Other arguments: as for `train_batches`.
    """
    data, store = config.data, prepared.store_valid
    sequences = PackedSequences(store, data.seq_len, config.tokenizer.pad_id, pad_tail=True)
    count = -(-len(sequences) // data.batch_size)
    batches = (
        grain.MapDataset.range(count * data.batch_size)
        .batch(data.batch_size)
        .map(_ReadRows(sequences, slice(None) if rows is None else rows, addresses_fn))
        .slice(slice(0, count if limit is None else min(limit, count)))
    )
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
    return iter(batches.to_iter_dataset(options))
