"""Starts a run from another run's checkpoint (`train.init_from`): continued training, fine-tuning.

Weights, tables and the routers' selection biases are the other run's, bit for bit, on any mesh;
schedule, data and their position are this run's from step 0. So is the optimizer, unless
`train.init_optimizer` keeps the moments: then only the schedule's count begins anew.

It is read once, where the run has no checkpoint of its own; from then on the run goes on from its
own, and the other one is no longer needed. What it began with is recorded in run.json
("initialised_from"), and shown by the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.addressing import (
    artifact,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_size,
)
from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.load_model import read_eos_id, restore_weights
from engram_jax.checkpoint.manager import Checkpointer, Restored
from engram_jax.checkpoint.run_record import (
    config_of_launch,
    launch_of,
    origin_of,
    read_launches,
    step_number,
)
from engram_jax.checkpoint.run_settings import Changes, covers, listed
from engram_jax.checkpoint.workdir import RUN, TOKENIZER, checkpoint_steps, parse_checkpoint
from engram_jax.config import DEVICE, FROZEN, Config
from engram_jax.config.difference import differences
from engram_jax.config.errors import UserError
from engram_jax.data.run_data import RunData
from engram_jax.data.train_bpe import find_eos
from engram_jax.model.program import Weights
from engram_jax.training.state import (
    TrainingProgram,
    TrainState,
    abstract_state,
    build_training,
    state_from,
    state_shardings,
)

KEY = "config.train.init_from"
# Sections that decide what weights and rows mean, and their keys that do not: what they start from,
# where and in what precision they are computed. Of the tokenizer the content is compared.
MEANING = ("model", "tokenizer")
WITHOUT_MEANING = (
    *("tokenizer.name", "tokenizer.path", "tokenizer.canonical_vocab_size", "tokenizer.eos_id"),
    *("model.init_std", "model.dtype", "model.remat", "model.kept", "model.kernels"),
    *("model.hyper.start", "model.hyper.scale_init", "model.ffn.bias_update_rate"),
    *("model.engram.init_std", "model.engram.addresses"),
    *("model.engram.precision", "model.engram.fp8_recipe"),
)
# What a later stage of training is for; recorded among the changes, without being asked for.
EXTENSION = "model.attention.yarn"


@dataclass(frozen=True)
class Ancestor:
    """The checkpoint that a run starts from.

    config: what it was trained with. launch: of its run.json. changes: accepted differences in what
    the weights mean.
    """

    workdir: Path
    step: int
    config: Config
    launch: dict[str, Any]
    changes: Changes


def parse_source(text: str) -> tuple[Path, str]:
    """(workdir, step) of WORKDIR or WORKDIR@STEP. Raises UserError for another STEP."""
    return parse_checkpoint(text, f"{KEY} = {text!r}")


def find_ancestor(
    config: Config, workdir: Path | None, accept: Sequence[str] = ()
) -> Ancestor | None:
    """The checkpoint that this launch starts from: None without `train.init_from`, and where
    `workdir` has checkpoints of its own. Nothing but small files is read.

    workdir: None = the run has no folder. accept: keys or sections in which the model may differ
    from the other run's.

    Raises UserError if there is no such checkpoint, or if it is of another model or tokenizer.
    """
    text = config.train.init_from
    if not text or (workdir is not None and checkpoint_steps(workdir)):
        return None
    source, wanted = parse_source(text)
    steps = checkpoint_steps(source)
    if not steps:
        what = "no such folder" if not source.is_dir() else "no run with a checkpoint there"
        raise UserError(f"{KEY} = {text!r}: {what}; must be the --workdir of a trained run")
    step = step_number(source, wanted)
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{KEY} = {text!r}: the run there has checkpoints of steps {there}")
    launch = launch_of(source, step)
    if launch is None:
        raise UserError(f"{KEY} = {text!r}: no {RUN} there, which says what its model means")
    stored, unknown = config_of_launch(source, launch)
    if unknown:
        raise UserError(
            f"{KEY} = {text!r}: its run has keys that this version does not know:"
            f" {', '.join(unknown)}"
        )
    changes = _changes(stored, config)
    if refused := [key for key in changes if not covers((*accept, EXTENSION), key)]:
        raise UserError(
            f"{KEY} = {text!r}: the model there is another: {listed(changes, refused)}; give the"
            " same, or accept what leaves the arrays' shapes as they are:"
            f" --accept_changes={','.join(refused)}"
        )
    _check_tokenizer(config, source, text)
    _check_moments(stored, config, text)
    return Ancestor(source, step, stored, launch, changes)


def _changes(stored: Config, config: Config) -> Changes:
    """Key -> (there, here) of what decides the meaning of weights and rows."""
    found = differences(stored, config)
    return {
        key: (theirs, ours)
        for key, theirs, ours in found
        if covers(MEANING, key) and not covers(WITHOUT_MEANING, key)
    }


def with_tokenizer(config: Config, workdir: Path | None) -> Config:
    """The configuration with the tokenizer of the run that it starts from, or that `workdir` has
    kept of it, where none is configured: one trained on this run's text would be another."""
    train, tokens = config.train, config.tokenizer
    if not train.init_from or tokens.path:
        return config
    folder = parse_source(train.init_from)[0]
    if workdir is not None and checkpoint_steps(workdir) and (workdir / TOKENIZER).is_file():
        folder = workdir
    path = str((folder / TOKENIZER).absolute())
    return dataclasses.replace(config, tokenizer=dataclasses.replace(tokens, path=path))


def _check_tokenizer(config: Config, source: Path, text: str) -> None:
    theirs = load_tokenizer(source / TOKENIZER)
    path = config.tokenizer.path
    mine = load_tokenizer(path) if path else theirs
    ids = [tokenizer_fingerprint(each) for each in (theirs, mine)]
    if ids[0] != ids[1]:
        raise UserError(
            f"{KEY} = {text!r}: its run has another tokenizer, {ids[0]}, than"
            f" config.tokenizer.path = {path!r}, {ids[1]}; leave that out to use the run's"
        )
    known = read_eos_id(source, tokenizer_size(theirs))
    if (eos_id := find_eos(mine, config.tokenizer)) != known:
        raise UserError(
            f"{KEY} = {text!r}: its run ends documents with token {known}, this one with {eos_id};"
            f" set config.tokenizer.eos_id={known}"
        )


def _check_moments(stored: Config, config: Config, text: str) -> None:
    """Moments can be kept for what both runs train."""
    if not config.train.init_optimizer:
        return
    pairs = {
        "train.trainable": (stored.train.trainable, config.train.trainable),
        "optimizer.memory_optimizer": tuple(c.optimizer.memory_optimizer for c in (stored, config)),
    }
    theirs, ours = pairs["optimizer.memory_optimizer"]
    if (theirs == FROZEN) == (ours == FROZEN):  # the two rules of Adam have the same moments
        del pairs["optimizer.memory_optimizer"]
    for key, (there, here) in pairs.items():
        if there != here:
            raise UserError(
                f"config.train.init_optimizer = True: config.{key} is {there!r} in {text} and"
                f" {here!r} here, so that moments are missing; give the same, or begin with a"
                " fresh optimizer"
            )


def with_ancestors_addresses(data: RunData, config: Config, workdir: Path) -> RunData:
    """The data with the addressing that the tables of this run have: the ancestor's, or what
    `workdir` has kept of it (f-grams are those of the first run's text).

    Raises UserError if the configuration and tokenizer give other addresses than the tables have.
    """
    if not config.train.init_from or data.addressing is None:
        return data
    own = checkpoint_steps(workdir)
    folder = workdir if own else parse_source(config.train.init_from)[0]
    mine = artifact.as_stored(data.addressing, folder)
    if not own:
        artifact.check_same(artifact.Addressing.load(folder / "addressing"), mine)
    return dataclasses.replace(data, addressing=mine)


def start_from(
    program: TrainingProgram, ancestor: Ancestor, log: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]]:
    """(the state before the first step, what run.json records of its origin).

    Raises UserError if the checkpoint is damaged or has other arrays than the program.
    """
    keep = program.config.train.init_optimizer
    with Checkpointer(
        ancestor.workdir, addressing=program.addressing, read_only=True
    ) as checkpointer:
        if keep:
            found = _with_moments(program, checkpointer, ancestor)
        else:
            found = restore_weights(program, checkpointer, ancestor.step, DEVICE)
            weights: Weights = found.state
            rows = table_order.as_stored(program, weights.rows)
            weights = dataclasses.replace(weights, rows=rows)
            found = dataclasses.replace(found, state=state_from(program, weights))
    what = "with its optimizer's moments" if keep else "with a fresh optimizer"
    log(f"initialised from step {found.step} of {ancestor.workdir}, {what}")
    return found.state, _record(ancestor, found, keep)


def _with_moments(
    program: TrainingProgram, checkpointer: Checkpointer, ancestor: Ancestor
) -> Restored:
    """The whole state, in the shape in which the other run keeps it, then in this run's."""
    theirs, config = ancestor.config.train, program.config
    train = dataclasses.replace(
        config.train, init_optimizer=theirs.init_optimizer, ema_decay=theirs.ema_decay
    )
    shaped = build_training(
        dataclasses.replace(config, train=train), program.addressing, program.mesh
    )
    found = table_order.restore(shaped, checkpointer, ancestor.step, abstract_state(shaped))

    def renewed(state: TrainState) -> TrainState:
        count = state.step if state.memory_steps is None else state.memory_steps
        fresh = dataclasses.replace(
            state,
            step=jnp.zeros_like(state.step),
            halted=jnp.zeros_like(state.halted),
            opt_state=from_step_zero(state.opt_state),
            memory_steps=count,
        )
        return program.with_average(fresh)

    begin = jax.jit(renewed, out_shardings=state_shardings(program), donate_argnums=0)
    return dataclasses.replace(found, state=begin(found.state))


def from_step_zero(opt_state: Any) -> Any:
    """An optax state whose schedules begin anew; moments, and the updates behind them, stay."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def renewed(node: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, node) if is_schedule(node) else node

    return jax.tree.map(renewed, opt_state, is_leaf=is_schedule)


def _record(ancestor: Ancestor, found: Restored, keep: bool) -> dict[str, Any]:
    """The origin as run.json has it, with its own origin inside."""
    record: dict[str, Any] = {
        "workdir": str(ancestor.workdir.absolute()),
        "name": ancestor.config.name,
        "step": found.step,
        "digest": found.digest,
        "optimizer": "kept" if keep else "fresh",
        "data": {k: ancestor.launch.get("data", {}).get(k) for k in ("source", "digest")},
    }
    if ancestor.changes:
        record["changed_settings"] = {key: list(both) for key, both in ancestor.changes.items()}
    if earlier := origin_of(read_launches(ancestor.workdir / RUN)):
        record["initialised_from"] = earlier
    return record


def other_text(ancestor: Ancestor, summary: dict[str, Any]) -> str:
    """A warning if the other run was trained on another text, "" if on this one."""
    theirs = (ancestor.launch.get("data") or {}).get("digest")
    if theirs is None or theirs == summary["digest"]:
        return ""
    return (
        f"the run in {ancestor.workdir} was trained on another text, {theirs}: what is held out"
        " here may be among it, and losses by seen n-grams do not know it"
    )
