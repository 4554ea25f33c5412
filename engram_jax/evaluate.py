"""Held-out loss."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.address import load_tokenizer, tokenizer_fingerprint
from engram_jax.checkpoint import Checkpointer
from engram_jax.config import Config
from engram_jax.errors import UserError
from engram_jax.generate import Weights
from engram_jax.restore import TOKENIZER, restore_state, weights_of
from engram_jax.run_data import RunData, open_data
from engram_jax.train_state import Program, build_program
from engram_jax.train_step import eval_step
from engram_jax.workdir import check_trained


class Evaluator:
    """The mean loss over held-out batches, compiled once."""

    def __init__(self, program: Program, data: RunData):
        self.program, self.data = program, data
        self._step = jax.jit(partial(eval_step, program))

    def loss(self, weights: Weights, batches: int | None = None) -> float:
        """Nats per target over the first `batches` held-out batches (None: all of them).

        Each batch's sum is read only after the next is dispatched.
        """
        total = jax.device_put(np.zeros(2, np.float32))
        for batch in self.data.validation_batches(batches):
            loss, count = self._step(
                weights.params, weights.router_bias, weights.rows, jax.device_put(batch)
            )
            total = total + jnp.stack([loss, count])
        loss, count = (float(x) for x in jax.device_get(total))
        return loss / max(count, 1.0)


def evaluate(config: Config, workdir: Path, step: str) -> dict[str, Any]:
    """Held-out loss of a checkpoint ("latest", "best" or a step) over the whole held-out split.

    Raises UserError if there is no such checkpoint, or if it is another model's or tokenizer's.
    """
    check_trained(workdir)
    data = open_data(config, log=lambda line: print(line, file=sys.stderr))
    check_tokenizer(workdir, data)
    program = build_program(config, data.addressing)
    with Checkpointer(workdir, addressing=data.addressing, read_only=True) as checkpointer:
        number, state = restore_state(program, checkpointer, step)
    loss = Evaluator(program, data).loss(weights_of(state))
    return {
        "name": config.name,
        "step": number,
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / data.prepared.bytes_per_token,
    }


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
