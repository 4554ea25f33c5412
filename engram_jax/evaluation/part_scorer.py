"""The losses of parts of texts, several to a sequence, none of which reads another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.data.packing import Batch
from engram_jax.data.placement import place_batch, rows_here
from engram_jax.evaluation.held_out import fetched
from engram_jax.evaluation.key_tokens import Part
from engram_jax.evaluation.scored_model import ScoredModel
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P
from engram_jax.training.step import score_step


class PartScorer:
    """A model that scores. context: tokens of its sequences."""

    def __init__(self, model: ScoredModel, context: int):
        program, shards = model.program, model.program.axes.batch
        data = program.config.data
        rows = max(1, data.batch_size * data.seq_len // context // shards) * shards
        self._size, self._length = rows, context
        self._model, self._program = model, _of_shape(program, rows, context)
        self._pad = program.config.tokenizer.pad_id

        def nats(params: Any, bias: Any, memory: Any, batch: Any) -> jax.Array:
            off = program.config.serve
            return score_step(self._program, params, bias, memory, batch, off)[0]

        self._step = program.jit(nats, out_shardings=NamedSharding(program.mesh, P()))

    def __call__(self, parts: Sequence[tuple[np.ndarray, Part]]) -> list[np.ndarray]:
        """The losses of each part's tokens from `first` on, float64. parts: (ids of a text, part);
        a part has at most `context` tokens, and a text's first token is not predicted."""
        places, rows = pack([part.end - part.start for _, part in parts], self._length)
        found: list[np.ndarray] = [np.zeros(0)] * len(parts)
        by_row: list[list[int]] = [[] for _ in range(rows)]
        for number, (row, _) in enumerate(places):
            by_row[row].append(number)
        groups = [by_row[at : at + self._size] for at in range(0, rows, self._size)]

        def dispatched() -> Iterator[jax.Array]:
            model, mesh = self._model, self._program.mesh
            here = rows_here(mesh, self._size)
            for group in groups:
                batch = self._batch(parts, places, group)
                own = {key: value[here] for key, value in batch.items()}
                placed = place_batch(mesh, own, self._size)
                yield self._step(model.params, model.router_bias, model.memory, placed)

        for group, nats in zip(groups, fetched(dispatched()), strict=True):
            for row, numbers in enumerate(group):
                for number in numbers:
                    part, at = parts[number][1], places[number][1]
                    first = max(part.first, part.start + 1)
                    # position t of a part predicts its token t + 1
                    low, high = at + first - part.start - 1, at + part.end - part.start - 1
                    found[number] = np.asarray(nats[row, low:high], np.float64)
        return found

    def _batch(
        self,
        parts: Sequence[tuple[np.ndarray, Part]],
        places: Sequence[tuple[int, int]],
        group: Sequence[Sequence[int]],
    ) -> Batch:
        """Arrays as of data/packing.py."""
        shape = self._size, self._length
        tokens, targets = np.full(shape, self._pad, np.int32), np.zeros(shape, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.float32)
        for row, numbers in enumerate(group):
            for segment, number in enumerate(numbers, 1):
                (ids, part), at = parts[number], places[number][1]
                own = ids[part.start : part.end]
                where = slice(at, at + len(own))
                tokens[row, where], segments[row, where] = own, segment
                positions[row, where] = np.arange(len(own))
                predicted = slice(at, at + len(own) - 1)
                targets[row, predicted], mask[row, predicted] = own[1:], 1
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": mask,
            "segments": segments,
            "positions": positions,
        }


def _of_shape(program: Program, rows: int, length: int) -> Program:
    config = program.config
    data = dataclasses.replace(config.data, batch_size=rows, seq_len=length)
    mesh = dataclasses.replace(config.mesh, distinct=0.0)  # was measured on batches of another size
    return dataclasses.replace(program, config=dataclasses.replace(config, data=data, mesh=mesh))


def pack(lengths: Sequence[int], row: int) -> tuple[list[tuple[int, int]], int]:
    """(row, place in it) of pieces in rows of `row` tokens, in order, and how many rows."""
    places, rows, used = [], 0, row
    for length in lengths:
        if used + length > row:
            rows, used = rows + 1, 0
        places.append((rows - 1, used))
        used += length
    return places, rows
