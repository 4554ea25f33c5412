"""A trained model back from its workdir, with the text side it was trained with.

workdir/tokenizer.json         the tokenizer        workdir/text.json   its end-of-sequence id
workdir/tokenizer_config.json  how other tools (transformers' AutoTokenizer) are to read it
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from engram_jax import distributed, saved_state
from engram_jax.address import artifact, load_tokenizer, tokenizer_fingerprint
from engram_jax.agreement import agree
from engram_jax.checkpoint import Checkpointer
from engram_jax.config import DEVICE, Config
from engram_jax.data import PreparedData
from engram_jax.errors import UserError
from engram_jax.generate import Weights
from engram_jax.memory.exchange import natural_order
from engram_jax.run_record import recorded
from engram_jax.run_settings import check_opened, told
from engram_jax.train_state import Program, TrainState, build_program
from engram_jax.workdir import TOKENIZER

_TEXT, _TOKENIZER_CONFIG = "text.json", "tokenizer_config.json"


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


def save_text_side(workdir: Path, prepared: PreparedData, config: Config) -> None:
    """The tokenizer as it was trained with, so that a run can be used without its data, by other
    tools too.

    Only the first process writes. A tokenizer.json that is the same one already stays.
    """
    if jax.process_index() != 0:
        return
    tokenizer, file = prepared.tokenizer, workdir / TOKENIZER
    mine = tokenizer_fingerprint(tokenizer)
    if not file.is_file() or tokenizer_fingerprint(load_tokenizer(file)) != mine:
        partial = file.with_suffix(".json.partial")  # a killed launch leaves no half of it
        tokenizer.save(str(partial))
        os.replace(partial, file)
    (workdir / _TEXT).write_text(json.dumps({"eos_id": prepared.eos_id}) + "\n")
    text = json.dumps(tokenizer_config(prepared, config), indent=1, ensure_ascii=False)
    (workdir / _TOKENIZER_CONFIG).write_text(text + "\n")


def tokenizer_config(prepared: PreparedData, config: Config) -> dict[str, Any]:
    """What transformers' AutoTokenizer reads beside a tokenizer.json: the same ids, and the same
    end of sequence, as in training."""
    tokenizer, pad_id = prepared.tokenizer, config.tokenizer.pad_id
    pad = tokenizer.get_added_tokens_decoder().get(pad_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(prepared.eos_id),
        "bos_token": None,  # training puts nothing before a document
        # A word that only fills gaps must not become a special token.
        "pad_token": pad.content if pad is not None and pad.special else None,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,  # special tokens that are spelled in a text are text
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.data.seq_len,
    }


def weights_of(program: Program, state: TrainState) -> Weights:
    """The part of a training state that inference uses, rows in their natural order."""
    mesh, layouts = program.mesh, program.layouts
    rows = {k: natural_order(mesh, layouts[k], t.rows) for k, t in state.memory.items()}
    return Weights(state.params, state.router_bias, rows)


def which(step: str) -> int | str | None:
    """ "latest", "best" or a number, as `Checkpointer.restore` takes it."""
    if step not in ("latest", "best") and not step.isdecimal():
        raise UserError(f"--step={step}: must be latest, best or a step number")
    return {"latest": None, "best": "best"}[step] if step in ("latest", "best") else int(step)


def load(
    config: Config,
    workdir: Path,
    step: str = "latest",
    rows: str | None = DEVICE,
    accept: Sequence[str] = (),
) -> Trained:
    """The model of a run. Raises UserError if the workdir holds none, or another one.

    rows: where to read the tables to: DEVICE, HOST (np.ndarray) or None = not at all.
    accept: keys or sections of `config` that may differ from what the run was trained with.
    """

    def read() -> tuple[Any, int]:
        if changes := check_opened(config, workdir, step, accept):
            distributed.warn(f"other settings than the run's: {told(changes)}")
        check_same_tokenizer(config, workdir)
        tokenizer = load_tokenizer(workdir / TOKENIZER, parse_special=config.serve.parse_special)
        return tokenizer, json.loads((workdir / _TEXT).read_text())["eos_id"]

    tokenizer, eos_id = agree(read)
    mine = artifact.build(config, tokenizer) if config.model.engram.layers else None
    addressing = None if mine is None else agree(lambda: artifact.as_stored(mine, workdir))
    program = build_program(config, addressing)
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        found = saved_state.restore_weights(program, checkpointer, which(step), rows)
    state = found.state
    tables = {} if rows is None else {k: t.rows for k, t in state.memory.items()}
    weights = Weights(state.params, state.router_bias, tables)
    seq_len = agree(lambda: _trained_length(found.metadata, workdir, found.step, config))
    run = workdir.resolve().name
    return Trained(program, weights, tokenizer, eos_id, found.step, run, found.digest, seq_len)


def _trained_length(metadata: dict[str, Any], workdir: Path, step: int, config: Config) -> int:
    """From the checkpoint; one of before has it from the launch that made it, or from `config`."""
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
