"""A trained model back from its workdir, with the text side it was trained with.

workdir/tokenizer.json   the tokenizer        workdir/text.json   its end-of-sequence id
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from engram_jax import provenance, saved_state
from engram_jax.address import artifact, load_tokenizer
from engram_jax.agreement import agree
from engram_jax.checkpoint import Checkpointer
from engram_jax.config import DEVICE, Config
from engram_jax.data import PreparedData
from engram_jax.errors import UserError
from engram_jax.generate import Weights
from engram_jax.memory.exchange import natural_order
from engram_jax.train_state import Program, TrainState, build_program
from engram_jax.workdir import check_trained

TOKENIZER, _TEXT = "tokenizer.json", "text.json"


@dataclass(frozen=True)
class Trained:
    """A restored model: what inference needs.

    run: name of its folder. digest: of the checkpoint (checkpoint_files.py). seq_len: tokens of the
    sequences it was last trained on, the longest that it knows.
    """

    program: Program
    weights: Weights
    tokenizer: Any
    eos_id: int
    step: int
    run: str
    digest: str
    seq_len: int

    @property
    def name(self) -> str:
        """This checkpoint, in messages."""
        return f"{self.program.config.name}, run {self.run}, step {self.step}"


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
    """step: as in `which`. Returns (the step, the state)."""
    restored = saved_state.restore(program, checkpointer, which(step))
    return restored.step, restored.state


def which(step: str) -> int | str | None:
    """ "latest", "best" or a number, as `Checkpointer.restore` takes it."""
    if step not in ("latest", "best") and not step.isdigit():
        raise UserError(f"--step={step}: must be latest, best or a step number")
    return {"latest": None, "best": "best"}[step] if step in ("latest", "best") else int(step)


def load(config: Config, workdir: Path, step: str = "latest", rows: str | None = DEVICE) -> Trained:
    """The model of a run. Raises UserError if the workdir holds none, or another one.

    rows: where to read the tables to: DEVICE, HOST (np.ndarray) or None = not at all.
    """

    def read() -> tuple[Any, int]:
        check_trained(workdir)
        return load_tokenizer(workdir / TOKENIZER), json.loads((workdir / _TEXT).read_text())[
            "eos_id"
        ]

    tokenizer, eos_id = agree(read)
    addressing = artifact.build(config, tokenizer) if config.model.engram.layers else None
    program = build_program(config, addressing)
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        found = saved_state.restore_weights(program, checkpointer, which(step), rows)
    state = found.state
    tables = {} if rows is None else {k: t.rows for k, t in state.memory.items()}
    weights = Weights(state.params, state.router_bias, tables)
    seq_len = agree(lambda: _trained_length(found.metadata, workdir, config))
    run = workdir.resolve().name
    return Trained(program, weights, tokenizer, eos_id, found.step, run, found.digest, seq_len)


def _trained_length(metadata: dict[str, Any], workdir: Path, config: Config) -> int:
    """From the checkpoint; one of before has it from the run's last launch, or from `config`."""
    if "seq_len" in metadata:
        return int(metadata["seq_len"])
    record = workdir / "run.json"
    if record.exists() and (launches := provenance.read(record)):
        return int(launches[-1]["config"]["data"]["seq_len"])
    return config.data.seq_len
