"""Held-out loss."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.address import load_tokenizer, tokenizer_fingerprint
from engram_jax.agreement import agree
from engram_jax.checkpoint import Checkpointer
from engram_jax.config import Config
from engram_jax.data.packing import PackedSequences
from engram_jax.errors import UserError
from engram_jax.restore import TOKENIZER, restore_state
from engram_jax.run_data import RunData, open_together, place_batch
from engram_jax.sharding.rules import P
from engram_jax.train_state import Program, TrainState, build_program
from engram_jax.train_step import eval_step
from engram_jax.workdir import check_trained


class Evaluator:
    """The mean loss over held-out batches, compiled once."""

    def __init__(self, program: Program, data: RunData):
        self.program, self.data = program, data
        self._step = program.jit(
            partial(eval_step, program), out_shardings=NamedSharding(program.mesh, P())
        )

    def loss(self, state: TrainState, batches: int | None = None) -> float:
        """Nats per target over the first `batches` held-out batches (None: all of them).

        Each batch's sum is read only after the next is dispatched. Raises UserError as
        `check_held_out`.
        """
        check_held_out(self.data, batches)
        pending: tuple[jax.Array, jax.Array] | None = None
        total = np.zeros(2)
        mesh, size = self.program.mesh, self.program.config.data.batch_size
        for host_batch in self.data.validation_batches(mesh, batches):
            batch = place_batch(mesh, host_batch, size)
            sums = self._step(state.params, state.router_bias, state.memory, batch)
            if pending is not None:
                total += jax.device_get(pending)
            pending = sums
        if pending is not None:
            total += jax.device_get(pending)
        return float(total[0] / total[1])


def check_held_out(data: RunData, batches: int | None = None) -> None:
    """Raises UserError if the first `batches` held-out batches (None: all) have no target: their
    mean loss is not defined, and as 0 would be the best of all."""
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


def evaluate(config: Config, workdir: Path, step: str) -> dict[str, Any]:
    """Held-out loss of a checkpoint ("latest", "best" or a step) over the whole held-out split.

    Raises UserError if there is no such checkpoint, or if it is another model's or tokenizer's.
    """
    agree(lambda: check_trained(workdir))
    data = open_together(config, log=lambda line: print(line, file=sys.stderr))
    agree(lambda: check_tokenizer(workdir, data))
    program = build_program(config, data.addressing)
    with Checkpointer(workdir, addressing=data.addressing, read_only=True) as checkpointer:
        number, state = restore_state(program, checkpointer, step)
    loss = Evaluator(program, data).loss(state)
    return {
        "name": config.name,
        "step": number,
        "validation_loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) / data.prepared.bytes_per_token,
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_tokenizer(workdir: Path, data: RunData) -> None:
    """Refuse to score token ids that mean something else than those the model was trained on."""
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
