"""A trained model back from its workdir, with the text side it was trained with.

workdir/tokenizer.json   the tokenizer        workdir/text.json   its end-of-sequence id
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from engram_jax import saved_state
from engram_jax.address import artifact, load_tokenizer
from engram_jax.agreement import agree
from engram_jax.checkpoint import Checkpointer
from engram_jax.config import Config
from engram_jax.data import PreparedData
from engram_jax.errors import UserError
from engram_jax.generate import Generator, Weights, stream_text
from engram_jax.memory.exchange import natural_order
from engram_jax.train_state import Program, TrainState, build_program
from engram_jax.workdir import check_trained

TOKENIZER, _TEXT = "tokenizer.json", "text.json"


@dataclass(frozen=True)
class Trained:
    """A restored model: what inference needs."""

    program: Program
    weights: Weights
    tokenizer: Any
    eos_id: int
    step: int


def save_text_side(workdir: Path, prepared: PreparedData) -> None:
    """Copy the tokenizer into the workdir, so that a run can be used without its data.

    Only the first process writes.
    """
    if jax.process_index() != 0:
        return
    shutil.copyfile(prepared.tokenizer_path, workdir / TOKENIZER)
    (workdir / _TEXT).write_text(json.dumps({"eos_id": prepared.eos_id}) + "\n")


def weights_of(program: Program, state: TrainState) -> Weights:
    """The part of a training state that inference uses, rows in their natural order."""
    mesh, layouts = program.mesh, program.layouts
    rows = {k: natural_order(mesh, layouts[k], t.rows) for k, t in state.memory.items()}
    return Weights(state.params, state.router_bias, rows)


def restore_state(
    program: Program, checkpointer: Checkpointer, step: str
) -> tuple[int, TrainState]:
    """step: "latest", "best" or a number. Returns (the step, the state)."""
    if step not in ("latest", "best") and not step.isdigit():
        raise UserError(f"--step={step}: must be latest, best or a step number")
    which: int | str | None = {"latest": None, "best": "best"}.get(step, step)
    if which not in (None, "best"):
        which = int(step)
    restored = saved_state.restore(program, checkpointer, which)
    return restored.step, restored.state


def load(config: Config, workdir: Path, step: str = "latest") -> Trained:
    """The model of a run. Raises UserError if the workdir holds none, or another one."""

    def read() -> tuple[Any, int]:
        check_trained(workdir)
        return load_tokenizer(workdir / TOKENIZER), json.loads((workdir / _TEXT).read_text())[
            "eos_id"
        ]

    tokenizer, eos_id = agree(read)
    addressing = artifact.build(config, tokenizer) if config.model.engram.layers else None
    program = build_program(config, addressing)
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        number, state = restore_state(program, checkpointer, step)
    return Trained(program, weights_of(program, state), tokenizer, eos_id, number)


def print_continuation(config: Config, workdir: Path, step: str, prompt: str) -> None:
    """Stream a prompt's continuation to standard output."""
    trained = load(config, workdir, step)
    generator = Generator(trained.program, trained.weights)
    stream = stream_text(generator, trained.tokenizer, prompt, config.generate, trained.eos_id)
    for piece in itertools.chain([prompt], stream, ["\n"]):  # every process decodes, one prints
        if jax.process_index() == 0:
            print(piece, end="", flush=True)
