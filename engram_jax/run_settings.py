"""The settings a run was trained with, and which of them another launch may change.

A number belongs to the settings that made it. So whoever opens a workdir that holds checkpoints
must mean the same run: every key of the configuration decides a result unless FREE lists it, and
one that differs from the run's is refused, or accepted by name and written down.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engram_jax import distributed
from engram_jax.config import Config, section_types
from engram_jax.config_difference import differences
from engram_jax.errors import UserError
from engram_jax.optim.schedule import learning_rate
from engram_jax.run_record import config_of, launch_of, recorded, step_number
from engram_jax.workdir import LOGS, LOSSES, RUN, check_trained, checkpoint_steps

# What decides no result: where and how fast a run computes, when it looks, saves and tells, what is
# done with a model afterwards. Of the two paths the content is compared (text, tokenizer).
FREE = (
    "name",
    "tokenizer.path",
    "model.remat",
    "model.kernels",
    "model.engram.addresses",
    "mesh",
    "data.path",
    "data.cache_dir",
    "data.workers",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_best",
    "train.count_models",
    "train.samples",
    "train.sample_tokens",
    "train.hang_seconds",
    "train.hang_exit",
    "generate",
    "serve",
)
# A run's position in its data is that of one stream of batches; no other can be continued.
DATA = "data"
# What text there is, and which of it is held out; the other keys of DATA cut it into batches.
TEXT = tuple(
    f"{DATA}.{key}"
    for key in (
        *("source", "path", "text_key", "max_megabytes", "max_document_bytes"),
        "validation_fraction",
    )
)
Changes = dict[str, tuple[Any, Any]]  # key -> (the run's value, this launch's)


def covers(keys: Sequence[str], key: str) -> bool:
    """Whether one of `keys` is `key` or a section around it."""
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def check_accepted(keys: Sequence[str]) -> tuple[str, ...]:
    """The keys of --accept_changes, without "config.". Raises UserError for one that is none."""
    accepted = tuple(key.strip().removeprefix("config.") for key in keys)
    for key in accepted:
        section: Any = Config
        for name in key.split("."):
            there = section_types(section)
            if name not in there:
                allowed = ", ".join(there) or "no keys"
                raise UserError(
                    f"--accept_changes={key}: unknown key {name!r}; there are {allowed}"
                )
            section = there[name]
    return accepted


def check_resumed(
    config: Config, workdir: Path, accept: Sequence[str], log: Callable[[str], None]
) -> Changes:
    """Whether `config` may go on with the run in `workdir`; returns what it changes, all accepted.

    accept: keys or sections that may differ. More or fewer steps need no acceptance where no step
    so far would have had another learning rate; the log then says what becomes of the schedule.

    Raises UserError with every other difference, for another data stream, if the run has more steps
    than are asked for, or as many and accepted settings that no step would be made with, and for
    results without checkpoints that are of other settings.
    """
    steps = checkpoint_steps(workdir)
    if not steps:
        if (workdir / LOSSES).exists() and _unsaved(config, workdir):
            raise UserError(
                f"--workdir={workdir}: holds the results of a run with other settings, whose"
                " checkpoints are gone; give another --workdir"
            )
        return {}
    stored = _stored(workdir, max(steps))
    if stored is None:
        return {}
    changes = _decisive(stored, config)
    done, wanted = max(steps), config.train.steps
    if "train.steps" in changes:
        if wanted < done:
            raise UserError(
                f"config.train.steps = {wanted}: the run in {workdir} has {done} steps already;"
                " give as many at least, or another --workdir"
            )
        if _same_rates(stored, config, done):
            accept = (*accept, "train.steps")
    if fixed := [key for key in changes if covers([DATA], key)]:
        raise UserError(
            f"--workdir={workdir}: the run there reads other data:"
            f" {_listed(changes, fixed)}; a run cannot go on with another stream of batches: give"
            " another --workdir"
        )
    more = f"set config.train.steps above {done} and " if wanted <= done else ""
    schedule = _schedule(stored, config, done)
    _refuse(workdir, changes, accept, f"give another --workdir, or {more}", schedule)
    if wanted <= done and (unused := [key for key in changes if key != "train.steps"]):
        raise UserError(
            f"--workdir={workdir}: the run there has made its {done} steps with other settings:"
            f" {_listed(changes, unused)}; none is left to make with these: set config.train.steps"
            " higher, or give another --workdir"
        )
    for key in changes:
        log(f"settings: {_listed(changes, [key])}{schedule if key == 'train.steps' else ''}")
    return changes


def forget_unsaved(config: Config, workdir: Path) -> None:
    """Remove what an earlier launch with other settings logged in `workdir`, where no checkpoint of
    it is left to go on from: its curves and its time are not the new run's."""
    if _unsaved(config, workdir):
        for name in LOGS:
            path = workdir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_opened(config: Config, workdir: Path, step: str, accept: Sequence[str] = ()) -> Changes:
    """Whether `config` is that of a checkpoint in `workdir`; returns what it changes, all accepted.

    step: "latest", "best" or a number. Raises UserError if no run was started there, and with every
    difference that `accept` (keys or sections) does not cover.
    """
    check_trained(workdir)
    stored = _stored(workdir, step_number(workdir, step))
    if stored is None:
        return {}
    changes = _decisive(stored, config)
    _refuse(workdir, changes, accept, "leave them out (and --config) to use the run's own, or ")
    return changes


def check_resumed_text(workdir: Path, text: Mapping[str, Any]) -> None:
    """Raises UserError if the run in `workdir` was trained on another text than this one.

    text: `PreparedData.summary`. A record of before does not say; the position in the data does.
    """
    steps = checkpoint_steps(workdir)
    launch = launch_of(workdir, max(steps)) if steps else None
    theirs = (launch or {}).get("data") or {}
    if theirs.get("digest", text["digest"]) != text["digest"]:
        raise UserError(
            f"config.data: {text['source']}, digest {text['digest']}, is not the text that the run"
            f" in {workdir} was trained on, {theirs['source']}, digest {theirs['digest']}: go back"
            " to it, or give another --workdir"
        )


def check_text(workdir: Path, trained_on: Any, found: str, accept: Sequence[str]) -> bool:
    """Whether the text at hand is the run's; raises UserError if it is not and neither DATA nor a
    key of TEXT is accepted. Both are fingerprints of text, split and tokenizer."""
    if trained_on is None or trained_on == found:
        return True
    if not any(covers(accept, key) for key in TEXT):
        raise UserError(
            f"config.data: the text, {found}, is not the one that the run in {workdir} was trained"
            f" and evaluated with, {trained_on}; to score it on another text, add"
            f" --accept_changes={DATA}"
        )
    distributed.warn(
        f"this is not the text that the run in {workdir} was trained and evaluated with: what is"
        " held out here may be among what it was trained on"
    )
    return False


def told(changes: Changes) -> str:
    """Changes in a line."""
    return _listed(changes, list(changes))


def _unsaved(config: Config, workdir: Path) -> Changes:
    """What differs from the last launch there, whatever became of it."""
    stored = recorded(workdir, sys.maxsize)
    return {} if stored is None else _decisive(stored, config)


def _decisive(stored: Config, config: Config) -> Changes:
    found = differences(stored, config)
    return {key: (theirs, ours) for key, theirs, ours in found if not covers(FREE, key)}


def _refuse(
    workdir: Path, changes: Changes, accept: Sequence[str], instead: str, schedule: str = ""
) -> None:
    refused = [key for key in changes if not covers(accept, key)]
    if refused:
        note = schedule if "train.steps" in refused else ""
        raise UserError(
            f"--workdir={workdir}: the run there has other settings: {_listed(changes, refused)}"
            f"{note}; {instead}accept the change on purpose:"
            f" --accept_changes={','.join(refused)}"
        )


def _listed(changes: Changes, keys: Sequence[str]) -> str:
    return ", ".join(
        f"config.{key} is {changes[key][0]!r} there and {changes[key][1]!r} here" for key in keys
    )


def _schedule(stored: Config, config: Config, done: int) -> str:
    """What other numbers of steps make of the learning rate, for a run that has `done`."""
    boundaries = []
    for given in (stored, config):
        fractions = given.optimizer.decay_at
        boundaries.append([round(fraction * given.train.steps) for fraction in fractions])
    before, after = _rates(stored, done)[-1], _rates(config, done)[-1]
    return (
        f" (the learning rate falls at steps {_and(boundaries[1])} instead of"
        f" {_and(boundaries[0])}; at step {done} it goes on with {after:.3g}, the run's was"
        f" {before:.3g})"
    )


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) or "none"


def _rates(config: Config, done: int) -> np.ndarray:
    """Learning rates of steps 0 to `done`, the last one being the next to be made."""
    rate = learning_rate(config.optimizer, config.train.steps)
    return np.asarray(rate(jnp.arange(done + 1, dtype=jnp.int32)))


def _same_rates(stored: Config, config: Config, done: int) -> bool:
    return bool((_rates(stored, done)[:-1] == _rates(config, done)[:-1]).all())


def _stored(workdir: Path, step: int) -> Config | None:
    """As `recorded`; tells what could not be compared."""
    launch = launch_of(workdir, step)
    if launch is None:
        distributed.warn(
            f"{workdir} has no {RUN}: whether its run had other settings was not checked"
        )
        return None
    config, unknown = config_of(workdir, launch)
    if unknown:
        distributed.warn(
            f"{workdir / RUN} has keys that this version does not know: {', '.join(unknown)}"
        )
    return config
