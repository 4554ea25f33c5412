"""Loads a trained model from its workdir, with the tokenizer it was trained with.

Nothing of training is imported: what inference needs of a checkpoint has no optimizer in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.addressing import artifact, load_tokenizer, tokenizer_fingerprint
from engram_jax.addressing.tokenizer import tokenizer_size
from engram_jax.checkpoint.manager import Checkpointer, Restored
from engram_jax.checkpoint.run_record import recorded, step_number
from engram_jax.checkpoint.run_settings import check_opened, told
from engram_jax.checkpoint.workdir import TEXT, TOKENIZER, parse_step
from engram_jax.config import DEVICE, HOST, Config
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import read_json
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree
from engram_jax.model.program import Program, Weights, build_program
from engram_jax.model.trained import join_trained, split_trained, trained_paths


@dataclass(frozen=True)
class LoadedModel:
    """A restored model: what inference needs.

    run: name of its folder. digest: of the checkpoint (checkpoint/integrity.py). seq_len: tokens of
    the sequences it was last trained on, the longest that it knows. trained_on: the fingerprint of
    its data (data/prepared.py), None if the checkpoint does not say.
    """

    program: Program
    weights: Weights
    tokenizer: Any
    eos_id: int
    step: int
    run: str
    digest: str
    seq_len: int
    trained_on: str | None = None

    @property
    def name(self) -> str:
        """This checkpoint, in messages."""
        return f"{self.program.config.name}, run {self.run}, step {self.step}"


def load_model(
    config: Config,
    workdir: Path,
    step: str = "latest",
    rows: str | None = DEVICE,
    accept: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """The model of a run. Raises UserError if the workdir holds none, or another one.

    rows: where to read the tables to: DEVICE, HOST (np.ndarray) or None = not at all.
    accept: keys or sections of `config` that may differ from what the run was trained with. tell:
    is given a line for each part that may take long.
    """

    def read() -> tuple[Any, int]:
        if changes := check_opened(config, workdir, step, accept):
            processes.warn(f"other settings than the run's: {told(changes)}")
        tell("reading the tokenizer")
        check_same_tokenizer(config, workdir)
        tokenizer = load_tokenizer(workdir / TOKENIZER, parse_special=config.serve.parse_special)
        return tokenizer, read_eos_id(workdir, tokenizer_size(tokenizer))

    tokenizer, eos_id = agree(read)
    tell("preparing the addresses" if config.model.engram.layers else "building the model")
    mine = artifact.build_addressing(config, tokenizer) if config.model.engram.layers else None
    addressing = None if mine is None else agree(lambda: artifact.as_stored(mine, workdir))
    program = build_program(config, addressing)
    tell(f"reading checkpoint {step_number(workdir, step)} of {workdir}")
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        found = restore_weights(
            program, checkpointer, parse_step(step), rows, average=config.serve.ema
        )
    seq_len = agree(lambda: _trained_length(found.metadata, workdir, found.step, config))
    run = workdir.resolve().name
    return LoadedModel(
        program=program,
        weights=found.state,
        tokenizer=tokenizer,
        eos_id=eos_id,
        step=found.step,
        run=run,
        digest=found.digest,
        seq_len=seq_len,
        trained_on=text_of(found),
    )


def text_of(restored: Restored) -> str | None:
    """The fingerprint of the data that a checkpoint was trained on; None if it does not say."""
    position = restored.iterator
    return position.get("data") if isinstance(position, dict) else None


def read_eos_id(workdir: Path, size: int) -> int:
    """The end-of-sequence id of the run's text, of a tokenizer of `size` ids (workdir/text.json).
    Raises UserError for a file that is missing, damaged or does not say it."""
    path = workdir / TEXT
    eos_id = read_json(path).get("eos_id")
    if type(eos_id) is not int or not 0 <= eos_id < size:
        raise UserError(
            f'{shown(path)}: "eos_id" is {shown(eos_id, quoted=isinstance(eos_id, str))}, must be'
            f" an id of the run's tokenizer, 0 to {size - 1}"
        )
    return eos_id


def restore_weights(
    program: Program,
    checkpointer: Checkpointer,
    step: int | str | None,
    rows: str | None,
    *,
    average: bool = False,
) -> Restored:
    """`Checkpointer.restore` of the `Weights` in a training state, rows in their natural order.

    rows: where to read the tables to: DEVICE, HOST (np.ndarray) or None = not at all.
    average: read the moving average (train.ema_decay) in place of the parameters that are trained.
    """
    weights = program.abstract_weights()
    tables: dict[str, Any] = {}
    if rows == DEVICE:
        tables = dict(weights.rows)
    elif rows == HOST:
        tables = {
            layer: np.empty((program.table_rows[layer], *table.shape[1:]), table.dtype)
            for layer, table in weights.rows.items()
        }
    layers = list(program.table_rows)
    trained = trained_paths(program.config, weights.params, layers)
    averaged, alone = split_trained(weights.params, trained) if average else (None, None)
    state = {
        "params": alone if average else weights.params,
        "average": averaged,
        "router_bias": weights.router_bias,
        "memory": {layer: {"rows": table} for layer, table in tables.items()},
    }
    stored = {f"memory/{layer}/rows": program.table_rows[layer] for layer in tables}
    found = checkpointer.restore(step, state, true_rows=stored, whole=False)
    read = found.state
    memory = {layer: table["rows"] for layer, table in read["memory"].items()}
    params = join_trained(read["average"], read["params"]) if average else read["params"]
    return dataclasses.replace(found, state=Weights(params, read["router_bias"], memory))


def _trained_length(metadata: dict[str, Any], workdir: Path, step: int, config: Config) -> int:
    """From the checkpoint; for one of an earlier version from its launch, or from `config`."""
    if "seq_len" in metadata:
        return int(metadata["seq_len"])
    return (recorded(workdir, step) or config).data.seq_len


def check_same_tokenizer(config: Config, workdir: Path) -> None:
    """Raises UserError if config.tokenizer.path names another tokenizer than the run's, which would
    not be used."""
    if not config.tokenizer.path:
        return
    given = tokenizer_fingerprint(load_tokenizer(config.tokenizer.path))
    trained = tokenizer_fingerprint(load_tokenizer(workdir / TOKENIZER))
    if given != trained:
        raise UserError(
            f"config.tokenizer.path = {config.tokenizer.path!r}: tokenizer {given} is not the one"
            f" that the model in {workdir} was trained with, {trained}; leave it out"
        )
