"""run.json: what a run was trained with, and how every launch of it can be repeated.

    {"launches": [{"time": ..., "command": ..., "resumed_at": 0, "config": {...}, "data": {...},
                   ...}, ...]}

A resumed run adds a launch. The file is replaced by renaming, so it is whole at any moment.

As a configuration file this module gives back a run's own configuration:
`--config=engram_jax/checkpoint/run_record.py:latest:runs/engram_tiny`, which is what
`--workdir=runs/engram_tiny` alone becomes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from engram_jax.checkpoint.workdir import (
    CHECKPOINTS,
    RUN,
    TOKENIZER,
    check_trained,
    checkpoint_steps,
    parse_step,
)
from engram_jax.config import Config, config_from_dict, section_types, to_dict
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import read_json
from engram_jax.hardware.storage import write_text
from engram_jax.monitoring import provenance

# serve.capacity's default in records from before serve.accept_longer, whatever had been trained.
_FORMER_CAPACITY = 1024


def get_config(argument: str) -> ml_collections.ConfigDict:
    """The configuration of "STEP:WORKDIR", as one under configs/ gives it.

    The tokenizer is the workdir's own copy, so neither text nor cache is needed to have it; a
    relative data.path is taken from the folder that the run was launched in. A serve.capacity that
    was not chosen is what it is now, the trained length.
    """
    step, _, folder = argument.partition(":")
    workdir = Path(folder)
    check_trained(workdir)
    launch = launch_of(workdir, step_number(workdir, step))
    if launch is None:
        raise UserError(f"--workdir={workdir}: has no {RUN}; give --config")
    config, _ = config_of_launch(workdir, launch)
    tokens, data = config.tokenizer, config.data
    if (workdir / TOKENIZER).is_file():
        tokens = dataclasses.replace(tokens, path=str((workdir / TOKENIZER).absolute()))
    there = Path(launch.get("directory") or ".") / Path(data.path).expanduser()
    if data.source == "folder" or (data.source == "tfds" and there.is_dir()):
        data = dataclasses.replace(data, path=str(there))
    serve = config.serve
    former = "accept_longer" not in launch["config"].get("serve", {})
    if former and serve.capacity == _FORMER_CAPACITY:
        serve = dataclasses.replace(serve, capacity=0)
    return ml_collections.ConfigDict(
        to_dict(dataclasses.replace(config, tokenizer=tokens, data=data, serve=serve))
    )


def add_launch(
    workdir: str | Path,
    config: Config,
    data: Mapping[str, Any],
    *,
    resumed_at: int = 0,
    changed_settings: Mapping[str, tuple[Any, Any]] | None = None,
    initialised_from: Mapping[str, Any] | None = None,
) -> Path:
    """Add this launch to `workdir`/run.json (made if missing); returns its path.

    data: what text is trained on (`PreparedData.summary`). resumed_at: the step this launch starts
    from. changed_settings: key -> (value before, value from here on), what was accepted to differ.
    initialised_from: the checkpoint of another run that the first step started from
    (run/ancestry.py).
    Only the first process writes.
    Raises UserError if the file there is not one of ours.
    """
    path = Path(workdir) / RUN
    if jax.process_index() != 0:
        return path
    launches = read_launches(path) if path.exists() else []
    launch = {
        **provenance.describe_launch(),
        "resumed_at": resumed_at,
        "config": to_dict(config),
        "data": dict(data),
    }
    if changed_settings:
        launch["changed_settings"] = dict(changed_settings)
    if initialised_from:
        launch["initialised_from"] = dict(initialised_from)
    launches.append(launch)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"launches": launches}, indent=1) + "\n")
    return path


def read_launches(path: str | Path) -> list[dict[str, Any]]:
    """The launches of a run.json, oldest first."""
    try:
        launches = read_json(path).get("launches")
    except UserError as error:
        raise UserError(f"{error}; not a record of launches: move it away") from error
    if not isinstance(launches, list) or not all(map(_is_launch, launches)):
        raise UserError(f"{shown(path)}: is not a record of launches; move it away")
    return launches


def _is_launch(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("resumed_at", 0)) is int


def origin_of(launches: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the run of these launches started from, another run's checkpoint; None = its seed."""
    began = [launch for launch in launches if launch.get("resumed_at", 0) == 0]
    return began[-1].get("initialised_from") if began else None


def recorded(workdir: Path, step: int) -> Config | None:
    """The configuration that checkpoint `step` was trained with; None if no record says so."""
    launch = launch_of(workdir, step)
    return None if launch is None else config_of_launch(workdir, launch)[0]


def launch_of(workdir: Path, step: int) -> dict[str, Any] | None:
    """The launch that made checkpoint `step`: the last one that began before it."""
    if not (workdir / RUN).exists():
        return None
    launches = read_launches(workdir / RUN)
    made = [launch for launch in launches if launch.get("resumed_at", 0) < max(step, 1)]
    return (made or launches)[-1] if launches else None


def config_of_launch(workdir: Path, launch: dict[str, Any]) -> tuple[Config, list[str]]:
    """A launch's configuration, and its keys that this version does not know.

    Keys that have been added since have their defaults, which mean what was done before them.
    """
    unknown: list[str] = []
    try:
        return config_from_dict(_known(launch["config"], Config, "config", unknown)), unknown
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{workdir / RUN}: is not a record of launches; move it away") from error
    except UserError as error:
        raise UserError(f"{workdir / RUN}: {error}") from error


def step_number(workdir: Path, step: str) -> int:
    """The step that "latest", "best" or a number means; 0 without checkpoints. Whether a number is
    there is checked when it is read."""
    steps = checkpoint_steps(workdir)
    wanted = parse_step(step)
    if isinstance(wanted, int):
        return wanted
    if wanted == "best":
        from engram_jax.checkpoint.integrity import loss_of, lowest  # imports Orbax

        best = lowest({number: loss_of(workdir / CHECKPOINTS / str(number)) for number in steps})
        if best is not None:
            return best
    return max(steps, default=0)


def _known(values: Any, section: Any, where: str, unknown: list[str]) -> dict[str, Any]:
    hints, known = section_types(section), {}
    for key, value in values.items():
        if key not in hints:
            unknown.append(f"{where}.{key}")
        elif section_types(hints[key]):
            known[key] = _known(value, hints[key], f"{where}.{key}", unknown)
        else:
            known[key] = value
    return known
