"""The two losses on held-out text, and the evaluation of a checkpoint.

validation_loss   over the first train.eval_batches batches of the held-out split: while training
held_out_loss     over the whole split: at the end of training, and by --mode=evaluate

Both in nats per target, a target being a token that is predicted (`loss_mask`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import as_stored, load_tokenizer, tokenizer_fingerprint
from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.run_settings import check_opened, check_text
from engram_jax.checkpoint.workdir import TOKENIZER, parse_step
from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.data.packing import PackedSequences
from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import RunData, open_on_all_processes
from engram_jax.distributed.consensus import agree
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P
from engram_jax.training.state import TrainState, abstract_state, build_training
from engram_jax.training.step import eval_step


@dataclass(frozen=True)
class Score:
    """loss: nats per target, the mean over all `targets` of `batches` held-out batches."""

    loss: float
    batches: int
    targets: int

    def __str__(self) -> str:
        return f"{self.loss:.4f} ({self.batches:,} batches, {self.targets:,} predicted tokens)"


class Evaluator:
    """The mean loss over held-out batches, compiled once."""

    def __init__(self, program: Program, data: RunData):
        self.program, self.data = program, data
        self._step = program.jit(
            partial(eval_step, program), out_shardings=NamedSharding(program.mesh, P())
        )

    def score(self, state: TrainState, batches: int | None = None) -> Score:
        """The loss over the first `batches` held-out batches (None: all of them).

        Each batch's sum is read only after the next is dispatched. Raises UserError as
        `check_held_out`.
        """
        check_held_out(self.data, batches)
        pending: tuple[jax.Array, jax.Array] | None = None
        total, count = np.zeros(2), 0
        mesh, size = self.program.mesh, self.program.config.data.batch_size
        for host_batch in self.data.validation_batches(mesh, batches):
            batch = place_batch(mesh, host_batch, size)
            sums = self._step(state.params, state.router_bias, state.memory, batch)
            if pending is not None:
                total += jax.device_get(pending)
            pending, count = sums, count + 1
        if pending is not None:
            total += jax.device_get(pending)
        return Score(float(total[0] / total[1]), count, round(total[1]))


def check_held_out(data: RunData, batches: int | None = None) -> None:
    """Raises UserError if the first `batches` held-out batches (None: all) have no target: their
    mean loss is not defined, and 0 would look like the best one."""
    config, store = data.config, data.prepared.store_valid
    sequences = PackedSequences(store, config.data.seq_len, config.tokenizer.pad_id, pad_tail=True)
    count = None if batches is None else batches * config.data.batch_size
    if not sequences.targets(count):
        first = "" if batches is None else f"first {batches} batches of the "
        raise UserError(
            f"the {first}held-out text ({store.documents:,} documents, {len(store):,} tokens) has"
            " no token to predict, the first of a document being none; give more text, or set"
            " config.data.validation_fraction or config.train.eval_batches higher"
        )


def evaluate(
    config: Config, workdir: Path, step: str, accept: Sequence[str] = ()
) -> dict[str, Any]:
    """Held-out loss of a checkpoint ("latest", "best" or a step) over the whole held-out split.

    accept: keys or sections of `config` that may differ from what the run was trained with; with
      "data" it is scored on another text. The result lists the differences.

    Raises UserError if there is no such checkpoint, or if it is of other settings, another model,
    tokenizer or text.
    """
    changes = agree(lambda: check_opened(config, workdir, step, accept))
    data = open_on_all_processes(config, log=lambda line: print(line, file=sys.stderr))
    agree(lambda: check_scored_tokenizer(workdir, data))
    mine = data.addressing
    addressing = None if mine is None else agree(lambda: as_stored(mine, workdir))
    program = build_training(config, addressing)
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        restored = table_order.restore(
            program, checkpointer, parse_step(step), abstract_state(program)
        )
    position = restored.iterator
    trained_on = position.get("data") if isinstance(position, dict) else None
    fingerprint = data.prepared.fingerprint
    same_text = agree(lambda: check_text(workdir, trained_on, fingerprint, accept))
    number, state = restored.step, restored.state
    score = Evaluator(program, data).score(state)
    result = {
        "name": config.name,
        "step": number,
        "held_out_loss": score.loss,
        "held_out_batches": score.batches,
        "held_out_targets": score.targets,
        "perplexity": perplexity(score.loss),
        "bits_per_byte": score.loss / math.log(2) / data.prepared.bytes_per_token,
    }
    if changes:
        result["changed_settings"] = {key: list(values) for key, values in changes.items()}
    return result if same_text else {**result, "another_text": True}


def perplexity(loss: float) -> float:
    """exp(loss); infinite on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_scored_tokenizer(workdir: Path, data: RunData) -> None:
    """Raises UserError unless the data was tokenised with the tokenizer of the run in `workdir`."""
    file = workdir / TOKENIZER
    theirs = tokenizer_fingerprint(load_tokenizer(file))
    ours = tokenizer_fingerprint(data.prepared.tokenizer)
    if theirs != ours:
        raise UserError(
            f"tokenizer {ours} (of this data) differs from {theirs}, which the model in {workdir}"
            f" was trained with; to score it on this data set config.tokenizer.path={file}"
        )


def table(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    return "\n".join(
        f"{key:18}{value:.4f}" if isinstance(value, float) else f"{key:18}{value}"
        for key, value in result.items()
    )
