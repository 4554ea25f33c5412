"""The settings a run was trained with, and which of them another launch may change.

A number belongs to the settings that made it. So whoever opens a workdir that holds checkpoints
must mean the same run: every key of the configuration decides a result unless FREE lists it, and
one that differs from the run's is refused, or accepted by name and written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.run_record import config_of_launch, launch_of, step_number
from engram_jax.checkpoint.workdir import RUN, check_trained
from engram_jax.config import Config, section_types
from engram_jax.config.difference import differences
from engram_jax.config.errors import UserError
from engram_jax.distributed import processes

# What decides no result: where and how fast a run computes, when it evaluates, saves and reports,
# what is done with a model afterwards. Of the two paths the content is compared (text, tokenizer).
FREE = (
    "name",
    "tokenizer.path",
    "model.remat",
    "model.kept",
    "model.kernels",
    "model.engram.addresses",
    "mesh",
    "data.path",
    "data.cache_dir",
    "data.workers",
    "train.log_every",
    "train.log_norms",
    "train.log_activations",
    "train.loggers",
    "train.eval_every",
    "train.evaluations",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_best",
    "train.count_models",
    "train.seen_tokens",
    "train.samples",
    "train.sample_tokens",
    "train.hang_seconds",
    "train.hang_exit",
    "generate",
    "serve",
)
# A run's position in its data is that of one stream of batches; no other can be continued.
DATA = "data"
# What text there is, and which of it is held out; the other keys of DATA make batches of it.
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


def check_opened(config: Config, workdir: Path, step: str, accept: Sequence[str] = ()) -> Changes:
    """Whether `config` is that of a checkpoint in `workdir`; returns what it changes, all accepted.

    step: "latest", "best" or a number. Raises UserError if no run was started there, and with every
    difference that `accept` (keys or sections) does not cover.
    """
    check_trained(workdir)
    stored = stored_config(workdir, step_number(workdir, step))
    if stored is None:
        return {}
    changes = decisive(stored, config)
    refuse(workdir, changes, accept, "leave them out (and --config) to use the run's own, or ")
    return changes


def check_text(workdir: Path, trained_on: Any, found: str, accept: Sequence[str]) -> bool:
    """Whether this text is the run's; raises UserError if it is not and neither DATA nor a
    key of TEXT is accepted. Both are fingerprints of text, split and tokenizer."""
    if trained_on is None or trained_on == found:
        return True
    if not any(covers(accept, key) for key in TEXT):
        raise UserError(
            f"config.data: the text is not the one that the run in {workdir} was trained and"
            f" evaluated with; to score it on another text, add --accept_changes={DATA}"
        )
    processes.warn(
        f"this is not the text that the run in {workdir} was trained and evaluated with: what is"
        " held out here may be among what it was trained on"
    )
    return False


def told(changes: Changes) -> str:
    """Changes in a line."""
    return listed(changes, list(changes))


def decisive(stored: Config, config: Config) -> Changes:
    found = differences(stored, config)
    return {key: (theirs, ours) for key, theirs, ours in found if not covers(FREE, key)}


def refuse(
    workdir: Path, changes: Changes, accept: Sequence[str], instead: str, schedule: str = ""
) -> None:
    refused = [key for key in changes if not covers(accept, key)]
    if refused:
        note = schedule if "train.steps" in refused else ""
        raise UserError(
            f"--workdir={workdir}: the run there has other settings: {listed(changes, refused)}"
            f"{note}; {instead}accept the change on purpose:"
            f" --accept_changes={','.join(refused)}"
        )


def listed(changes: Changes, keys: Sequence[str]) -> str:
    return ", ".join(
        f"config.{key} is {changes[key][0]!r} there and {changes[key][1]!r} here" for key in keys
    )


def stored_config(workdir: Path, step: int) -> Config | None:
    """As `recorded`; warns of what could not be compared."""
    launch = launch_of(workdir, step)
    if launch is None:
        processes.warn(
            f"{workdir} has no {RUN}: whether its run had other settings was not checked"
        )
        return None
    config, unknown = config_of_launch(workdir, launch)
    if unknown:
        processes.warn(
            f"{workdir / RUN} has keys that this version does not know: {', '.join(unknown)}"
        )
    return config
