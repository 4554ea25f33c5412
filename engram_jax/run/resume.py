"""Checks whether a launch may resume the run in its workdir: the same settings, the same text.

More steps are allowed where no step so far would have had another learning rate; every other change
that affects a result is refused, or accepted by name; checkpoint/run_settings.py has the list.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engram_jax.addressing import load_tokenizer, tokenizer_fingerprint
from engram_jax.checkpoint.run_record import launch_of, recorded
from engram_jax.checkpoint.run_settings import (
    DATA,
    Changes,
    covers,
    decisive,
    listed,
    refuse,
    stored_config,
)
from engram_jax.checkpoint.workdir import LOGS, LOSSES, TOKENIZER, checkpoint_steps
from engram_jax.config import CONSTANT, FROZEN, STEP, Config
from engram_jax.config.errors import UserError
from engram_jax.training.optim.schedule import decay_start, falls, learning_rate


def check_resumed(
    config: Config, workdir: Path, accept: Sequence[str], log: Callable[[str], None]
) -> Changes:
    """Check that `config` may resume the run in `workdir`; returns its changes, all accepted.

    accept: keys or sections that may differ. More or fewer steps need no acceptance where no step
    so far would have had another learning rate; the log then says how the schedule changes.

    Raises UserError for every other difference; for another data stream; if the run has more steps
    than asked for, or as many and other settings, which no step would use; and if the workdir has
    results of other settings without checkpoints.
    """
    steps = checkpoint_steps(workdir)
    if not steps:
        if (workdir / LOSSES).exists() and _unsaved(config, workdir):
            raise UserError(
                f"--workdir={workdir}: holds the results of a run with other settings, whose"
                " checkpoints are gone; give another --workdir"
            )
        return {}
    stored = stored_config(workdir, max(steps))
    if stored is None:
        return {}
    changes = decisive(stored, config)
    done, wanted = max(steps), config.train.steps
    if "train.steps" in changes:
        if wanted < done:
            raise UserError(
                f"config.train.steps = {wanted}: the run in {workdir} has {done} steps already;"
                " give as many at least, or another --workdir"
            )
        if _same_rates(stored, config, done):
            accept = (*accept, "train.steps")
    if fixed := [key for key in changes if key in ("train.init_from", "train.init_optimizer")]:
        raise UserError(
            f"--workdir={workdir}: the run there has {done} steps and goes on from its own"
            f" checkpoints: {listed(changes, fixed)}; give what it began with, or another --workdir"
        )
    if fixed := [key for key in changes if _other_state(key, *changes[key])]:
        raise UserError(
            f"--workdir={workdir}: the run there keeps another state:"
            f" {listed(changes, fixed)}; it cannot go on so: give another --workdir, and"
            f" --config.train.init_from={workdir} to start there from its weights"
        )
    if fixed := [key for key in changes if covers([DATA], key)]:
        raise UserError(
            f"--workdir={workdir}: the run there reads other data:"
            f" {listed(changes, fixed)}; a run cannot go on with another stream of batches: give"
            " another --workdir"
        )
    more = f"set config.train.steps above {done} and " if wanted <= done else ""
    schedule = _schedule(stored, config, done)
    refuse(workdir, changes, accept, f"give another --workdir, or {more}", schedule)
    if wanted <= done and (unused := [key for key in changes if key != "train.steps"]):
        raise UserError(
            f"--workdir={workdir}: the run there has made its {done} steps with other settings:"
            f" {listed(changes, unused)}; none is left to make with these: set config.train.steps"
            " higher, or give another --workdir"
        )
    for key in changes:
        log(f"settings: {listed(changes, [key])}{schedule if key == 'train.steps' else ''}")
    return changes


def forget_unsaved(config: Config, workdir: Path) -> None:
    """Remove what an earlier launch with other settings logged in `workdir`, where it left no
    checkpoint to resume: its curves and its time are not the new run's."""
    if _unsaved(config, workdir):
        for name in LOGS:
            path = workdir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_resumed_text(workdir: Path, text: Mapping[str, Any]) -> None:
    """Raises UserError if the run in `workdir` was trained on another text than this one.

    text: `PreparedData.summary`. Records of earlier versions have no digest; for their runs the
    fingerprint in the data iterator's state is compared instead (data/pipeline.py).
    """
    steps = checkpoint_steps(workdir)
    launch = launch_of(workdir, max(steps)) if steps else None
    theirs = (launch or {}).get("data") or {}
    if theirs.get("digest", text["digest"]) != text["digest"]:
        then, now = _size(theirs), _size(text)
        if theirs["source"] != text["source"]:
            what = f"{theirs['source']} ({then}), and not on {text['source']} ({now})"
        else:
            changed = f"{now} now, {then} then" if now != then else f"{now}, but not the same ones"
            what = f"{text['source']} has changed since ({changed}): go back to it"
        raise UserError(
            f"--workdir={workdir}: the run there was trained on another text: {what}; or give"
            " another --workdir (or --config.name, which names it)"
        )


def check_resumed_tokenizer(config: Config, workdir: Path, tokenizer: Any) -> None:
    """Raises UserError if the run in `workdir` was trained with another tokenizer than this one."""
    file, steps = workdir / TOKENIZER, checkpoint_steps(workdir)
    if not steps or not file.is_file():
        return
    if tokenizer_fingerprint(load_tokenizer(file)) == tokenizer_fingerprint(tokenizer):
        return
    stored = recorded(workdir, max(steps))
    theirs = config.tokenizer.path if stored is None else stored.tokenizer.path
    ours = config.tokenizer.path
    what = f"config.tokenizer.path is {theirs!r} there and {ours!r} here"
    if theirs == ours:
        what = f"config.tokenizer.path = {ours!r} gives another one now"
        if not ours:
            what = "the one that is trained on the text is another one now"
    raise UserError(
        f"--workdir={workdir}: the run there was trained with another tokenizer: {what}; to go on"
        f" there, set config.tokenizer.path={file}, or give another --workdir (or --config.name)"
    )


def _size(text: Mapping[str, Any]) -> str:
    """How much text a summary (`PreparedData.summary`) is of, for the user."""
    documents = text.get("train_documents", 0) + text.get("validation_documents", 0)
    size = text.get("train_bytes", 0) + text.get("validation_bytes", 0)
    return f"{documents:,} documents of {size:,} bytes"


def _unsaved(config: Config, workdir: Path) -> Changes:
    """What differs from the last launch in `workdir`, whether or not it saved a checkpoint."""
    stored = recorded(workdir, sys.maxsize)
    return {} if stored is None else decisive(stored, config)


def _other_state(key: str, theirs: Any, ours: Any) -> bool:
    """Whether a key's change is one of the arrays that a checkpoint has: moments, an average."""
    if key == "optimizer.memory_optimizer":
        return FROZEN in (theirs, ours)
    if key == "train.ema_decay":
        return 0 in (theirs, ours)
    return key == "train.trainable"


def _schedule(stored: Config, config: Config, done: int) -> str:
    """How another number of steps changes the learning rate of a run that has done `done`."""
    before, after = _rates(stored, done)[-1], _rates(config, done)[-1]
    (how, theirs), (verb, ours) = _falls(stored), _falls(config)
    other = "" if how == verb else f"{how} "
    return (
        f" (the learning rate {verb} {ours} instead of {other}{theirs}; at step {done} it goes on"
        f" with {after:.3g}, the run's was {before:.3g})"
    )


def _falls(config: Config) -> tuple[str, str]:
    """How and where a configuration's learning rate falls, in words."""
    optimizer, total = config.optimizer, config.train.steps
    if optimizer.schedule == CONSTANT:
        return "falls at steps", "none"
    if optimizer.schedule == STEP:
        return "falls at steps", _and(falls(optimizer, total))
    return "decays over steps", f"{decay_start(optimizer, total)} to {total}"


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) or "none"


def _rates(config: Config, done: int) -> np.ndarray:
    """Learning rates of steps 0 to `done`, the last one being the next step's."""
    rate = learning_rate(config.optimizer, config.train.steps)
    return np.asarray(rate(jnp.arange(done + 1, dtype=jnp.int32)))


def _same_rates(stored: Config, config: Config, done: int) -> bool:
    return bool((_rates(stored, done)[:-1] == _rates(config, done)[:-1]).all())
