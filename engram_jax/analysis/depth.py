"""Effective depth: how soon a model's layers predict what it will, and which layers of two models
are alike (the paper's LogitLens and CKA), over batches of a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from engram_jax.analysis.cka import SMALLEST, MinibatchCKA
from engram_jax.analysis.layer_states import jit_lens, jit_states
from engram_jax.analysis.texts import spread
from engram_jax.data.packing import Batch
from engram_jax.data.placement import place_batch
from engram_jax.model.program import Program

MINIBATCH = 256  # tokens of a minibatch of CKA
Variables = tuple[Any, Any, Any]  # parameters, router bias, tables, as training has them


@dataclass(frozen=True)
class Lens:
    """KL(softmax of a layer's logits || the model's), nats, by layer.

    mean: float64 [layers], over all `tokens` but padding. error: its standard error, [layers], with
    sequences as what is drawn; NaN of one sequence.
    """

    mean: np.ndarray
    error: np.ndarray
    tokens: int


def log_lens(program: Program, variables: Variables, batches: Iterable[Batch]) -> Lens:
    """LogitLens of a model over batches. program: of a single process."""
    lens, size = jit_lens(program), program.config.data.batch_size
    sums, counts = [], []
    for batch in batches:
        found = lens(*variables, place_batch(program.mesh, batch, size))
        real = batch["segments"] > 0
        kept = np.where(real, np.asarray(jax.device_get(found), np.float64), 0).sum(axis=2)
        sums.append(kept.T[real.any(axis=1)])
        counts.append(real.sum(axis=1)[real.any(axis=1)])
    of_sequences, tokens = np.concatenate(sums), np.concatenate(counts)
    mean = of_sequences.sum(axis=0) / tokens.sum()
    n = len(tokens)
    squares = ((of_sequences - mean * tokens[:, None]) ** 2).sum(axis=0)
    error = np.sqrt(squares * n / (n - 1)) / tokens.sum() if n > 1 else np.full_like(mean, np.nan)
    return Lens(mean, error, int(tokens.sum()))


def states_at(
    program: Program,
    variables: Variables,
    states: Any,
    batch: Batch,
    places: Sequence[np.ndarray],
    most: int,
) -> np.ndarray:
    """The states after every layer at some tokens of a batch, float32 [layers, n, d], in the order
    of the sequences. states: `jit_states` of the program. places: of each sequence, at most `most`.
    """
    chosen = np.zeros((len(places), most), np.int32)
    there = np.zeros(chosen.shape, bool)
    for row, at in enumerate(places):
        chosen[row, : len(at)], there[row, : len(at)] = at, True
    placed = place_batch(program.mesh, {**batch, "chosen": chosen}, len(places))
    return np.asarray(jax.device_get(states(*variables, placed)))[:, there]


@dataclass(frozen=True)
class Similarity:
    """cka: float64 [layers of the first, layers of the second]. tokens: whose states were compared;
    batches: in so many minibatches."""

    cka: np.ndarray
    tokens: int
    batches: int


def similarity(
    models: Sequence[tuple[Program, Variables]],
    texts: Iterable[tuple[Batch, Sequence[np.ndarray]]],
    minibatch: int = MINIBATCH,
) -> Similarity:
    """CKA between the layers of two models, or of one and itself, at some tokens of the same text.

    texts: batches, each with int [n] for every sequence, its tokens; of more than an eighth of a
      sequence, evenly spaced ones. What is left at the end and is less than a minibatch is left
      out, unless nothing else is there. The programs have one mesh and one form of batches.

    Raises ValueError for fewer than 4 tokens.
    """
    most = max(8, models[0][0].config.data.seq_len // 8)
    compiled = [jit_states(program) for program, _ in models]
    found, tokens = MinibatchCKA(), 0
    held: list[np.ndarray] = []  # of each model, states [layers, n, d] that are in no minibatch yet

    def add(count: int) -> None:
        found.add(held[0][:, :count], held[-1][:, :count])

    for batch, given in texts:
        places = [at[spread(len(at), most)] for at in given]
        if not any(map(len, places)):
            continue
        new = [
            states_at(program, variables, states, batch, places, most)
            for (program, variables), states in zip(models, compiled, strict=True)
        ]
        held = [np.concatenate(x, axis=1) for x in zip(held, new, strict=True)] if held else new
        while held[0].shape[1] >= minibatch:
            add(minibatch)
            tokens += minibatch
            held = [x[:, minibatch:] for x in held]
    rest = held[0].shape[1] if held else 0
    if not found.batches:
        if rest < SMALLEST:
            raise ValueError(f"{rest} tokens to compare at: must be at least {SMALLEST}")
        add(rest)
        tokens = rest
    return Similarity(found.similarity(), tokens, found.batches)
