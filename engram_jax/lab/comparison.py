"""Every point against the baseline: means, paired intervals over seeds and over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engram_jax.lab.experiment import Launch, Point
from engram_jax.lab.plan import Plan
from engram_jax.lab.results import Row
from engram_jax.lab.statistics import (
    Documents,
    Interval,
    paired_bootstrap,
    read_documents,
    t_interval,
)


@dataclass(frozen=True)
class Compared:
    """A point with finished runs.

    rows: of its runs at the chosen learning rate. loss: mean over all their seeds. seeds: those
    that the baseline has, too, with the same text. difference: to the baseline, mean of `seeds`,
    with the interval over them. by_documents: the same with the interval over held-out documents;
    None where the runs did not write them.
    """

    point: Point
    rows: Sequence[Row]
    loss: float
    seeds: Sequence[int]
    difference: Interval
    by_documents: Interval | None


def compare(plan: Plan, rows: Sequence[Row]) -> list[Compared]:
    """The points of the plan that have results, in the plan's order."""
    used = [row for row in rows if row["used"]]
    baseline = _by_seed(used, plan.experiment.baseline)
    found = []
    for point in plan.points:
        mine = _by_seed(used, point.name)
        if not mine:
            continue
        losses = [row["held_out_loss"] for row in mine.values()]
        common = [s for s in sorted(mine.keys() & baseline) if text(mine[s]) == text(baseline[s])]
        if point.name == plan.experiment.baseline:
            common = []
        differences = [mine[s]["held_out_loss"] - baseline[s]["held_out_loss"] for s in common]
        found.append(
            Compared(
                point,
                list(mine.values()),
                sum(losses) / len(losses),
                common,
                t_interval(differences),
                _bootstrap(plan, point, baseline, common, mine),
            )
        )
    return found


def text(row: Row) -> tuple[str, int]:
    """What tells the text that a run read and was evaluated on: losses of others do not compare."""
    return row["text_digest"], row["held_out_targets"]


def _by_seed(rows: Sequence[Row], point: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["point"] == point}


def _bootstrap(
    plan: Plan,
    point: Point,
    baseline: dict[int, Row],
    seeds: Sequence[int],
    mine: dict[int, Row],
) -> Interval | None:
    if not seeds:
        return None
    base_point = plan.experiment.point(plan.experiment.baseline)
    base = _documents(plan, base_point, baseline, seeds)
    variant = _documents(plan, point, mine, seeds)
    if base is None or variant is None:
        return None
    try:
        return paired_bootstrap(base, variant)
    except ValueError:  # as many targets in other documents
        return None


def _documents(
    plan: Plan, point: Point, rows: dict[int, Row], seeds: Sequence[int]
) -> list[Documents] | None:
    found = [
        read_documents(plan.workdir(Launch(point, seed, rows[seed]["learning_rate"])))
        for seed in seeds
    ]
    return None if any(run is None for run in found) else [run for run in found if run is not None]
