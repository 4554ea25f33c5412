"""kNN-LM: the model's distribution mixed with that of the nearest training contexts.

Khandelwal et al., "Generalization through Memorization: Nearest Neighbor Language Models", arXiv
1911.00172, section 2. The datastore has a pair (k_i, v_i) for every target of the training text:
the context's hidden state and the token that followed. With the k nearest keys N of a query q and
squared distances d (equations 2 and 3):

    p_kNN(y) = sum of exp(-d(k_i, q) / temperature) over i in N with v_i = y, normalised over N
    p(y)     = w p_kNN(y) + (1 - w) p_model(y)

Keys are the hidden states after the last norm, which the head multiplies, in float32; the paper
takes the input of the last feed-forward layer. The number of neighbours, the temperature and the
weight w are those of a grid with the lowest loss on the tuning half (evaluation/neighbours.py).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.data.long_documents import Sequences
from engram_jax.data.placement import place_batch
from engram_jax.distributed import processes
from engram_jax.evaluation.held_out import Checkpoint, fetched
from engram_jax.evaluation.neighbours import (
    FLAT,
    IVF,
    Measured,
    check_halves,
    check_memory,
    open_neighbours,
    record,
    text_sequences,
    tunes,
)
from engram_jax.evaluation.target_losses import held_out_sequences
from engram_jax.training.step import score_step

INDEXES = (FLAT, IVF)
NEIGHBOURS = (4, 16, 64, 256, 1024)
TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean squared distance to the nearest key
WEIGHTS = (0.0, 0.01, 0.02, *(round(0.05 * i, 2) for i in range(1, 20)))
_QUERIES = 4096  # looked up at a time
_DIFFERENCES = 128  # of them whose differences to their neighbours exist at a time
_PROBES = 32  # cells of an inverted file that are searched


@dataclass(frozen=True)
class Settings:
    """text: TRAINED or ALL (neighbours.py). tokens: the first so many targets of it, 0 = all.
    index: FLAT compares with every key, IVF with those of the nearest 32 cells."""

    text: str
    tokens: int = 0
    index: str = FLAT


@dataclass(frozen=True)
class Choice:
    """neighbours: k. temperature: in units of squared distance. weight: of the neighbours."""

    neighbours: int
    temperature: float
    weight: float


class Datastore:
    """keys float32 [n, d] and values int32 [n], searched by faiss."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, index: str = FLAT) -> None:
        import faiss

        self._keys, self._values = np.ascontiguousarray(keys), values
        self._faiss, self._index = faiss, None
        self.bytes = keys.nbytes + values.nbytes
        if index == IVF:
            cells = max(1, min(int(4 * len(keys) ** 0.5), len(keys) // 39))  # faiss wants 39 a cell
            quantiser = faiss.IndexFlatL2(keys.shape[1])
            self._index = faiss.IndexIVFFlat(quantiser, keys.shape[1], cells)
            self._index.nprobe = min(_PROBES, cells)
            self._index.train(self._keys)
            self._index.add(self._keys)
            self.bytes += 8 * len(keys) + 4 * cells * keys.shape[1]  # ids of keys, and centres

    def search(
        self, queries: np.ndarray, targets: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest keys of queries [m, d], nearest first: squared distances float32 [m, k],
        and whether the value is the query's target, bool [m, k]."""
        distances = np.empty((len(queries), k), np.float32)
        hits = np.empty((len(queries), k), bool)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            wanted = np.ascontiguousarray(queries[part])
            if self._index is None:
                at = self._faiss.knn(wanted, self._keys, k)[1]
            else:
                at = self._index.search(wanted, k)[1]
            found = self._squares(wanted, at)
            order = np.argsort(found, axis=1, kind="stable")
            at = np.take_along_axis(at, order, axis=1)
            distances[part] = np.take_along_axis(found, order, axis=1)
            hits[part] = (at >= 0) & (self._values[at] == targets[part, None])
        return distances, hits

    def _squares(self, queries: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Squared distances to the keys numbered `at` [m, k], infinite for -1: an inverted file may
        find fewer than k.

        faiss takes |q|^2 + |k|^2 - 2 q k, whose rounding a low temperature would enlarge.
        """
        found = np.empty(at.shape, np.float32)
        for start in range(0, len(at), _DIFFERENCES):
            part = slice(start, start + _DIFFERENCES)
            differences = self._keys[at[part]] - queries[part, None]
            found[part] = np.einsum("mkd,mkd->mk", differences, differences)
        return np.where(at < 0, np.float32(np.inf), found)


def target_probabilities(
    distances: np.ndarray, hits: np.ndarray, neighbours: int, temperature: float
) -> np.ndarray:
    """p_kNN of the targets, float64 [m], from what `Datastore.search` found, [m, at least k]."""
    found = np.empty(len(distances))
    for start in range(0, len(distances), _QUERIES):
        part = slice(start, start + _QUERIES)
        nearest = distances[part, :neighbours].astype(np.float64)
        first = np.where(np.isfinite(nearest[:, :1]), nearest[:, :1], 0)  # nothing found: all 0
        weights = np.exp((first - nearest) / temperature)
        total = np.maximum(weights.sum(axis=1), np.finfo(np.float64).tiny)
        found[part] = np.sum(weights * hits[part, :neighbours], axis=1) / total
    return found


def mixed_nats(nats: np.ndarray, probabilities: np.ndarray, weight: float) -> np.ndarray:
    """-log of w p_kNN + (1 - w) p_model, float64 [m]. nats: the model's own."""
    if weight == 0:
        return nats
    return -np.log(weight * probabilities + (1 - weight) * np.exp(-nats))


def choose(nats: np.ndarray, distances: np.ndarray, hits: np.ndarray) -> Choice:
    """The settings with the lowest mean loss on these targets."""
    nearest = distances[np.isfinite(distances[:, 0]), 0]
    scale = max(float(nearest.mean()) if len(nearest) else 0.0, float(np.finfo(np.float32).tiny))
    counts = sorted({min(k, distances.shape[1]) for k in NEIGHBOURS})
    best, choice = np.inf, Choice(counts[0], scale, 0.0)
    for k, temperature in itertools.product(counts, TEMPERATURES):
        probabilities = target_probabilities(distances, hits, k, temperature * scale)
        for weight in WEIGHTS:
            loss = float(mixed_nats(nats, probabilities, weight).mean())
            if loss < best:
                best, choice = loss, Choice(k, temperature * scale, weight)
    return choice


class HiddenStates:
    """Runs the model over packed sequences: every target's hidden state, token and loss."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._step = checkpoint.program.jit(partial(score_step, checkpoint.program))

    def __call__(
        self, sequences: Sequences, numbers: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(hidden float32 [n, d], tokens int32 [n], nats float32 [n]) of the targets of a batch of
        sequences after another."""
        program, state = self._checkpoint.program, self._checkpoint.state
        size = program.config.data.batch_size
        batches: list[Any] = []

        def dispatched() -> Iterator[Any]:
            for start in range(0, len(numbers), size):
                chosen = numbers[start : start + size]
                filled = np.append(chosen, np.full(size - len(chosen), len(sequences)))
                batches.append(sequences.batch(filled))
                batch = place_batch(program.mesh, batches[-1], size)
                yield self._step(state.params, state.router_bias, state.memory, batch)

        for nats, hidden in fetched(dispatched()):
            batch = batches.pop(0)
            real = batch["loss_mask"] > 0
            yield np.asarray(hidden, np.float32)[real], batch["targets"][real], nats[real]


def evaluate_knn(config: Config, workdir: Path, step: str, settings: Settings) -> dict[str, Any]:
    """The held-out loss of a checkpoint with a datastore of its training text beside its own.

    Returns `neighbours.record`. Raises UserError as `open_neighbours`, and for a datastore that
    does not fit in memory.
    """
    tell = processes.stages(sys.stderr)  # standard output is the result
    tell("reading the checkpoint and its text")
    found = open_neighbours(config, workdir, step, "--neighbours=knn")
    tuned = tunes(found.data)
    check_halves(tuned, "--neighbours=knn")
    sequences, numbers = text_sequences(found.data, settings.text, found.step)
    model, held_out = HiddenStates(found), held_out_sequences(found.data)
    next(model(held_out, np.arange(1)))  # compiles: no part of the seconds below
    tell("filling the datastore")
    keys, values, build_seconds = _read(model, sequences, numbers, settings.tokens, config)
    store = Datastore(keys, values, settings.index)

    tell(f"scoring {len(held_out):,} sequences")
    started = time.perf_counter()
    parts = list(model(held_out, np.arange(len(held_out))))
    model_seconds = time.perf_counter() - started
    queries, targets, nats = (np.concatenate(x) for x in zip(*parts, strict=True))
    nats = nats.astype(np.float64)
    tell(f"searching {len(keys):,} keys for {len(queries):,} tokens")
    started = time.perf_counter()
    distances, hits = store.search(queries, targets, min(max(NEIGHBOURS), len(keys)))
    search_seconds = time.perf_counter() - started

    choice = choose(nats[tuned], distances[tuned], hits[tuned])
    probabilities = target_probabilities(distances, hits, choice.neighbours, choice.temperature)
    both = mixed_nats(nats, probabilities, choice.weight)
    alone = model_seconds / len(nats)
    return record(
        "knn",
        found,
        {
            "text": settings.text,
            "datastore_tokens": len(keys),
            "key_width": keys.shape[1],
            "index": settings.index,
            "neighbours": choice.neighbours,
            "temperature": choice.temperature,
            "weight": choice.weight,
            "searched_neighbours": distances.shape[1],
            "build_seconds": build_seconds,
        },
        tuned,
        [
            Measured("model alone", nats, 0, alone),
            Measured("with kNN-LM", both, store.bytes, alone + search_seconds / len(nats)),
        ],
    )


def _read(
    model: HiddenStates, sequences: Sequences, numbers: np.ndarray, limit: int, config: Config
) -> tuple[np.ndarray, np.ndarray, float]:
    """(keys, values, seconds) of the first `limit` targets of these sequences, 0 = all."""
    most = len(numbers) * sequences.seq_len
    size, width = min(most, limit or most), config.model.d_model
    check_memory(4.0 * size * (width + 1), f"--knn_tokens: a datastore of {size:,} tokens")
    keys, values, count = np.empty((size, width), np.float32), np.empty(size, np.int32), 0
    started = time.perf_counter()
    for hidden, tokens, _ in model(sequences, numbers):
        take = min(len(tokens), size - count)
        keys[count : count + take], values[count : count + take] = hidden[:take], tokens[:take]
        count += take
        if count == size:
            break
    if not count:
        raise UserError("--neighbours=knn: the training text has no token to predict")
    return keys[:count], values[:count], time.perf_counter() - started
