"""What the synthetic tasks of a run owe to parts of its memory (evaluation/tasks.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_jax.addressing import drawable_ids
from engram_jax.analysis.sensitivity import Part, counts_at, rows_off
from engram_jax.analysis.usage import NgramCounts
from engram_jax.checkpoint.workdir import TASK_ITEMS
from engram_jax.config import OVER_ENCODING
from engram_jax.data.mixed_tasks import read_items
from engram_jax.evaluation.tasks import encode, jit_scores, score, summarise
from engram_jax.memory.exchange import natural_order
from engram_jax.model.program import Weights
from engram_jax.run.analysis_inputs import Given

_TOLD = 5  # parts, after which a line says how far it is
ITEMS = 40  # of a task, difficulty and frequency: its first ones


def task_effects(
    given: Given, parts: Sequence[Part], ngrams: Mapping[int, NgramCounts]
) -> list[dict[str, Any]]:
    """For every part, the groups of `summarise`: accuracies with the memory on and the part off."""
    subject = given.model
    program, tokenizer = subject.program, subject.loaded.tokenizer
    params, bias, memory = subject.variables
    natural = {
        k: natural_order(program.mesh, program.layouts[k], table.rows)
        for k, table in memory.items()
    }
    weights = Weights(params, bias, natural)
    items, encoded = [], []
    taken: dict[tuple[str, str, int], int] = {}
    for item in read_items(given.workdir / TASK_ITEMS).items:
        group = item.task, item.difficulty, item.frequency
        candidates = encode(tokenizer, item)
        short = max(len(ids) for ids, _ in candidates) <= subject.loaded.seq_len
        if short and taken.get(group, 0) < ITEMS:
            taken[group] = taken.get(group, 0) + 1
            items.append(item)
            encoded.append(candidates)
    drawable = drawable_ids(tokenizer, program.config.tokenizer.vocab_size)
    compiled: dict[tuple[str, ...], Any] = {}

    def scores(part: Part) -> Any:
        # In form "over_encoding" a layer that is off is its rows, taken as zero.
        whole = part.heads is None and program.config.model.engram.form != OVER_ENCODING
        off = tuple(map(str, part.layers)) if whole else ()
        if off not in compiled:
            compiled[off] = jit_scores(program, off, drawable)

        def masks(batch: dict[str, np.ndarray]) -> dict[str, Any]:
            if whole:
                return {}
            return rows_off(program, part, batch, counts_at(program, batch, ngrams))[0]

        return score(program, weights, encoded, off, compiled=compiled[off], masks=masks)

    given.tell(f"scores of {len(items):,} items of the synthetic tasks")
    on, effects = scores(Part("nothing", (), ())), []
    for number, part in enumerate(parts):
        if number % _TOLD == 0:
            given.tell(f"the same with parts {number + 1} to {len(parts)} off, one at a time")
        effects.append({"part": part.name, "groups": summarise(items, on, scores(part))})
    return effects
