"""What an experiment declares: points, seeds and learning rates; the configuration of each.

A file under configs/experiments/ makes one `Experiment` and hands its `config` out as get_config,
so that every point of it is an ordinary configuration that runs alone:

    python launch.py --config=configs/experiments/allocation.py:rho=0.75,seed=1
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ml_collections import ConfigDict

from engram_jax.config.errors import UserError

Value = float | int | str
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Point:
    """One setting of an experiment, run with several seeds.

    key, value: what is varied, and its value here: ("rho", 0.75).
    variant: the line of the plot that it belongs to.
    family: of points that share a learning rate.
    """

    key: str
    value: Value
    variant: str
    family: str

    @property
    def name(self) -> str:
        """As on the command line: "rho=0.75"."""
        return f"{self.key}={text_of(self.value)}"


@dataclass(frozen=True)
class Launch:
    """One run of an experiment."""

    point: Point
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """The argument of its configuration file, and the name of its folder."""
        return f"{self.point.name},seed={self.seed},rate={text_of(self.rate)}"


@dataclass(frozen=True)
class Experiment:
    """A sweep.

    name: of its results.
    title: one line over the report.
    base: makes the configuration that the budgets are compared with.
    build: makes a point's configuration, without seed and learning rate.
    points: in the order of the table.
    baseline: name of the point that the others' losses are compared with.
    seeds: of every point; `train.seed` and `data.seed` alike, so that the points of one seed have
      common initial values and batches.
    rates: `optimizer.peak_lr` values to choose from, by family.
    tune: name of the point that a family's rates are tried at, by family.
    tune_seed: the seed they are tried with.
    axis: what the loss is shown over, in words. column: the column of the results with its values;
      "": the points are named things. log_axis: show it by its logarithm, with a line fitted to the
      loss over it.
    free: makes the point of a value of `key` that is not among `points`; None: there is none.
    source: the workdir of the run that a launch begins with (`train.init_from`); None: with none.
    """

    name: str
    title: str
    base: Callable[[], ConfigDict]
    build: Callable[[Point], ConfigDict]
    points: tuple[Point, ...]
    baseline: str
    seeds: tuple[int, ...]
    rates: Mapping[str, tuple[float, ...]]
    tune: Mapping[str, str]
    axis: str
    column: str = ""
    tune_seed: int = 0
    log_axis: bool = False
    free: Callable[[str, float], Point] | None = field(default=None)
    source: Callable[[Launch], str] | None = field(default=None)

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if len(set(names)) != len(names):
            raise UserError(f"experiment {self.name}: two points have one name")
        for wanted in (self.baseline, *self.tune.values()):
            if wanted not in names:
                raise UserError(f"experiment {self.name}: {wanted} is not one of its points")
        for family in {point.family for point in self.points}:
            if family not in self.tune or not self.rates.get(family):
                raise UserError(f"experiment {self.name}: family {family} has no rates to try")

    def config(self, argument: str = "") -> ConfigDict:
        """The configuration of "KEY=VALUE,seed=S,rate=R"; without a point the baseline's, without a
        seed the first, without a rate the middle one of the family. Raises UserError."""
        launch = self.parse(argument)
        config = _built(self, launch.point).copy_and_resolve_references()
        config.unlock()
        config.name = re.sub(r"[^\w.+-]+", "-", f"{self.name}-{launch.name}")
        config.train.seed = config.data.seed = launch.seed
        config.optimizer.peak_lr = launch.rate
        if self.source is not None:
            config.train.init_from = self.source(launch)
        return config

    def parse(self, argument: str) -> Launch:
        """The launch that an argument of the configuration file means. Raises UserError."""
        given: dict[str, str] = {}
        for item in filter(None, argument.split(",")):
            key, equals, value = item.partition("=")
            if not equals or key in given:
                raise UserError(f"{argument}: {item!r} must be KEY=VALUE, each key once")
            given[key] = value
        seed = _number(given.pop("seed", str(self.seeds[0])), "seed", int)
        rate = given.pop("rate", None)
        names = [f"{key}={value}" for key, value in given.items()] or [self.baseline]
        if len(names) > 1:
            raise UserError(f"{argument}: must have one of {self.keys()}, and seed and rate")
        point = self.point(names[0])
        tried = self.rates[point.family]
        chosen = tried[len(tried) // 2] if rate is None else _number(rate, "rate", float)
        return Launch(point, seed, chosen)

    def point(self, name: str) -> Point:
        """The point called `name`, declared or not. Raises UserError."""
        for point in self.points:
            if point.name == name:
                return point
        key, _, value = name.partition("=")
        if self.free is not None and key in {point.key for point in self.points}:
            return self.free(key, _number(value, key, float))
        declared = ", ".join(point.name for point in self.points)
        raise UserError(f"experiment {self.name} has no point {name}; it has {declared}")

    def keys(self) -> str:
        return ", ".join(dict.fromkeys(point.key for point in self.points))


def text_of(value: Value) -> str:
    """A value as it stands on the command line."""
    return value if isinstance(value, str) else f"{value:.12g}"


@functools.lru_cache(maxsize=64)
def _built_once(build: Callable[[Point], ConfigDict], point: Point) -> ConfigDict:
    return build(point)


def _built(experiment: Experiment, point: Point) -> ConfigDict:
    return _built_once(experiment.build, point)


def _number(text: str, key: str, kind: type[Number]) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = kind(-1)
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{key}={text}: must be a {'whole ' if kind is int else ''}number >= 0")
    return value
