"""Runs on disk: opened from a workdir, saved to one as launch.py reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.addressing import as_stored, build_addressing, load_tokenizer, tokenizer_size
from engram_jax.api.models import Model, configure
from engram_jax.api.texts import documents_of
from engram_jax.api.training import Documents
from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.load_model import check_same_tokenizer, read_eos_id, text_of
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.run_record import add_launch, get_config
from engram_jax.checkpoint.run_settings import (
    check_opened,
    check_text,
    decisive,
    refuse,
    stored_config,
)
from engram_jax.checkpoint.run_tokenizer import save_text_side
from engram_jax.checkpoint.workdir import TOKENIZER, check_writable, checkpoint_steps, locked
from engram_jax.config import parse_config
from engram_jax.config.errors import UserError
from engram_jax.config.given_files import local_path
from engram_jax.data.array_store import array_store
from engram_jax.data.prepared import ARRAYS, of_arrays
from engram_jax.data.run_data import open_data
from engram_jax.evaluation.held_out import check_scored_tokenizer, restore_state
from engram_jax.training.state import TrainState, build_training, check_fits


@dataclass(frozen=True)
class Run:
    """A run's checkpoint. trained_on: the fingerprint of its data, None if it does not say. accept:
    what may differ."""

    model: Model
    state: TrainState
    workdir: Path
    step: int
    trained_on: str | None
    accept: tuple[str, ...] = ()


def open_run(
    workdir: str | os.PathLike[str],
    step: str | int = "latest",
    changes: Mapping[str, Any] | None = None,
    accept: Sequence[str] = (),
) -> Run:
    """A run's checkpoint, with its own configuration and tokenizer, and its whole state: it can be
    trained on. Neither its text nor any cache is needed.

    step: "latest", "best" (the lowest validation loss) or a number. changes: values in place of the
      run's own, as for `configure`; those that decide a result must be accepted. accept: keys or
      sections that may differ (--accept_changes).

    Raises UserError, in launch.py's words, if there is no such checkpoint, or if it is damaged or
    of other settings.

    Example: `run = open_run("runs/engram_tiny", "best"); generate(run.model, run.state, ["def "])`.
    """
    folder = local_path("workdir", os.fspath(workdir))
    config = configure(parse_config(get_config(f"{step}:{folder}")), changes)
    accepted = tuple(accept)
    check_opened(config, folder, str(step), accepted)
    check_same_tokenizer(config, folder)
    tokenizer = load_tokenizer(folder / TOKENIZER, parse_special=config.serve.parse_special)
    eos_id = read_eos_id(folder, tokenizer_size(tokenizer))
    addressing = None
    if config.model.engram.layers:
        addressing = as_stored(build_addressing(config, tokenizer), folder)
    program = build_training(config, addressing)
    check_fits(program)
    found = restore_state(program, folder, str(step))
    model = Model(program, tokenizer, eos_id)
    return Run(model, found.state, folder, found.step, text_of(found), accepted)


def run_documents(run: Run, held_out: bool = True) -> list[np.ndarray]:
    """The documents that a run holds out, or those that it trains on, in their order, int32 [n]
    each, the id that ends a document included: from its text, which is prepared again if it is no
    longer in the cache. `evaluate` of the held-out ones is --mode=evaluate, to the last bit.

    Raises UserError if the text is not there or is another one than the run's.

    Example: `evaluate(run.model, run.state, run_documents(run)).loss`.
    """
    data = open_data(run.model.config, log=lambda line: None, count_fgrams=False)
    check_scored_tokenizer(run.workdir, data)
    check_text(run.workdir, run.trained_on, data.prepared.fingerprint, run.accept)
    prepared = data.prepared
    return documents_of(prepared.store_valid if held_out else prepared.store_train)


def save_run(
    model: Model,
    state: TrainState,
    workdir: str | os.PathLike[str],
    documents: Documents | None = None,
) -> Path:
    """Save what was trained as a run: --mode=generate, serve and export-memory, `open_run` and
    train.init_from take it as one of launch.py's. Returns its folder.

    A folder with a run of the same configuration gets a further checkpoint. documents: what it was
    trained on, of which a digest is kept: launch.py has no text that is the same, so it evaluates
    the run on another one only (--accept_changes=data), and does not go on training it.

    Raises UserError for a model without a tokenizer, for a folder that cannot be written or that
    holds another run, and if there is a checkpoint of this step.

    Example: `save_run(model, state, "runs/mine")`, then
    `python launch.py --workdir=runs/mine --mode=generate --prompt="def main("`.
    """
    folder = local_path("workdir", os.fspath(workdir))
    if model.tokenizer is None or model.eos_id is None:
        raise UserError("model: has no tokenizer that ends documents; a run needs one")
    config, program, step = model.config, model.program, int(state.step)
    check_writable(folder)
    done = checkpoint_steps(folder)
    if done and (stored := stored_config(folder, max(done))) is not None:
        refuse(folder, decisive(stored, config), (), "give another folder, or ")
    if done and step <= max(done):
        raise UserError(f"{folder}: has a checkpoint of step {max(done)}; the state's is {step}")
    store = array_store([[0]] if documents is None else documents, config.tokenizer.vocab_size)
    digest = "" if documents is None else store.digest
    summary: dict[str, Any] = {"source": ARRAYS, "digest": digest}
    if documents is not None:
        summary |= {"train_documents": store.documents, "train_tokens": len(store)}
    train = config.train
    with (
        locked(folder),
        Checkpointer(
            folder, addressing=program.addressing, keep=train.keep, keep_best=train.keep_best
        ) as checkpointer,
    ):
        add_launch(folder, config, summary, resumed_at=max(done, default=0))
        save_text_side(folder, of_arrays(store, model.tokenizer, model.eos_id), config)
        table_order.save(
            program,
            checkpointer,
            step,
            state,
            iterator={"next_batch": step, "data": f"{ARRAYS} {digest}".strip()},
            metadata={"config": config.name, "seq_len": config.data.seq_len},
        )
    return folder
