"""Which runs an experiment consists of, what each is asked to be, and how far it is.

A sweep's folder holds a workdir for every run, named like the run; `logs/` beside them has what
each printed and `attempts` of it, `locks/` a file that is locked while the run is trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from engram_jax.checkpoint.run_record import recorded
from engram_jax.checkpoint.run_settings import decisive, listed
from engram_jax.checkpoint.workdir import LOSSES
from engram_jax.config import Config, parse_config
from engram_jax.config.errors import UserError
from engram_jax.data.cache import read_json, write_json
from engram_jax.lab.experiment import Experiment, Launch, Point


@dataclass(frozen=True)
class Plan:
    """The part of an experiment that one command runs.

    folder: of the sweep. points, seeds: those of the part. override: applies what the command line
    set to a configuration.
    """

    experiment: Experiment
    folder: Path
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    override: Callable[[ConfigDict], None] = field(default=lambda config: None)

    def config(self, launch: Launch) -> Config:
        """The configuration a run is asked to have."""
        config = self.experiment.config(launch.name)
        self.override(config)
        return parse_config(config)

    def base(self) -> Config:
        """The configuration whose budget the points are compared with."""
        config = self.experiment.base()
        self.override(config)
        return parse_config(config)

    def whole(self) -> Plan:
        """All points and seeds of the experiment, and those of the part that it does not declare:
        what a report is of."""
        points = dict.fromkeys((*self.experiment.points, *self.points))
        seeds = dict.fromkeys((*self.experiment.seeds, *self.seeds))
        return dataclasses.replace(self, points=tuple(points), seeds=tuple(seeds))

    def workdir(self, launch: Launch) -> Path:
        return self.folder / launch.name

    def trials(self) -> tuple[Launch, ...]:
        """The runs that choose the learning rate of the part's families that have several."""
        experiment = self.experiment
        return tuple(
            Launch(experiment.point(experiment.tune[family]), experiment.tune_seed, rate)
            for family in self._families()
            if len(experiment.rates[family]) > 1
            for rate in experiment.rates[family]
        )

    def _families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.family for point in self.points))

    def runs(self, rates: Mapping[str, float]) -> tuple[Launch, ...]:
        """The runs of the part whose family has a rate, seed by seed."""
        return tuple(
            Launch(point, seed, rates[point.family])
            for seed in self.seeds
            for point in self.points
            if point.family in rates
        )

    def losses(self, launch: Launch) -> dict[str, Any] | None:
        """losses.json of a finished run; None of one that is not, or has no record of its settings.

        Raises UserError if the run in its folder has other settings than it is asked to have.
        """
        found = read_json(self.workdir(launch) / LOSSES)
        if found is None or not self._as_asked(launch, found["step"]):
            return None
        return found if found["step"] >= self.config(launch).train.steps else None

    def diverged(self, launch: Launch) -> bool:
        """Whether training ended because the loss was not finite, the same settings given.

        Raises UserError as `losses` does.
        """
        noted = attempts(self.folder, launch)
        return bool(noted and noted[-1].get("diverged")) and self._as_asked(launch, sys.maxsize)

    def _as_asked(self, launch: Launch, step: int) -> bool:
        """Whether the run there, up to a step, has a record, which says what it is asked to be."""
        workdir = self.workdir(launch)
        stored = recorded(workdir, step)
        if stored is None:
            return False
        if changes := decisive(stored, self.config(launch)):
            raise UserError(
                f"{workdir}: the run there has other settings: {listed(changes, list(changes))};"
                " go back to them, or give another --workdir"
            )
        return True

    def missing(self, launch: Launch) -> str:
        """Why a run is no result; "" of one that is."""
        try:
            if self.losses(launch) is not None:
                return ""
            if self.diverged(launch):
                return f"diverged: {attempts(self.folder, launch)[-1]['why']}"
        except UserError as error:
            return str(error)
        why = [attempt["why"] for attempt in attempts(self.folder, launch) if attempt["why"]]
        return f"failed: {why[-1]}" if why else "not finished"

    def chosen_rates(self) -> dict[str, float]:
        """Of every family whose trials have all finished or diverged, the rate of the lowest
        held-out loss that is finite; no rate of a family without one. A family's only rate."""
        best: dict[str, tuple[float, float]] = {}
        open_families = set()
        for launch in self.trials():
            family = launch.point.family
            loss = self._trial_loss(launch)
            if loss is None:
                open_families.add(family)
            elif math.isfinite(loss):
                best[family] = min(best.get(family, (loss, launch.rate)), (loss, launch.rate))
        tried = {family: rate for family, (_, rate) in best.items() if family not in open_families}
        rates = self.experiment.rates
        return tried | {name: rates[name][0] for name in self._families() if len(rates[name]) == 1}

    def _trial_loss(self, launch: Launch) -> float | None:
        """Infinite of one that diverged, None of one that has not ended well."""
        try:
            losses = self.losses(launch)
            if losses is not None:
                return held_out_loss(losses)
            return math.inf if self.diverged(launch) else None
        except UserError:  # `missing` says why
            return None


def part(
    experiment: Experiment,
    folder: Path,
    points: Sequence[str],
    seeds: Sequence[str],
    override: Callable[[ConfigDict], None],
) -> Plan:
    """The part that --points and --seeds name, all of both where they are empty. Points that are
    not declared, and seeds, may be named, too. Raises UserError."""
    wrong = [seed for seed in seeds if not seed.isdecimal()]
    if wrong:
        raise UserError(f"--seeds={','.join(seeds)}: must be whole numbers >= 0")
    return Plan(
        experiment,
        folder,
        tuple(dict.fromkeys(map(experiment.point, points))) or experiment.points,
        tuple(dict.fromkeys(map(int, seeds))) or experiment.seeds,
        override,
    )


def held_out_loss(losses: Mapping[str, Any]) -> float:
    """Nats per token of the model, of losses.json: the first entry, before any count model's."""
    return float(next(iter(losses["held_out_loss"]["nats_per_token"].values())))


def log_file(folder: Path, launch: Launch) -> Path:
    return folder / "logs" / f"{launch.name}.log"


def attempts(folder: Path, launch: Launch) -> list[dict[str, Any]]:
    """What the sweeps on this folder noted of a run's processes, oldest first: start, host,
    seconds, processor's seconds, exit status, and the last line of one that failed."""
    found = read_json(log_file(folder, launch).with_suffix(".json"))
    return found if isinstance(found, list) else []


def add_attempt(folder: Path, launch: Launch, attempt: Mapping[str, Any]) -> None:
    path = log_file(folder, launch).with_suffix(".json")
    write_json(path, [*attempts(folder, launch), json.loads(json.dumps(attempt))])
