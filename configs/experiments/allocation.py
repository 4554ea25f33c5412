"""Sparsity allocation at the demo's size: how the loss depends on rho at equal budgets.

    python launch.py --mode=sweep --config=configs/experiments/allocation.py
    python launch.py --config=configs/experiments/allocation.py:rho=0.8,seed=1

rho = 1 is configs/moe_tiny.py; below it routed experts give way to rows of two Engram tables
(configs/engram_tiny.py's), and the dense layer's width compensates their projections: P_tot, P_act
and FLOPs per token are the base's (engram_jax/model/budgets.py, rule "matched"). Experts are whole,
so the rho reached, which the table shows, is up to 0.026 off. 400 steps of 16 x 128 tokens, about
5 minutes a run on 2 cores; docs/lab.md says how to read the results.
"""

from collections.abc import Callable

import ml_collections

from configs import engram_tiny, moe_tiny
from engram_jax.config import parse_config, to_dict
from engram_jax.lab.experiment import Experiment, Point
from engram_jax.model import budgets

PAIR_RHO = 0.7


def base() -> ml_collections.ConfigDict:
    """The budget: the pure MoE."""
    return plain(moe_tiny.get_config())


def plain(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Without count models and samples at the end of the run, and without near duplicates of
    held-out documents in training; the last checkpoint alone is kept."""
    config.train.count_models = False
    config.train.samples = ()
    config.train.keep, config.train.keep_best = 1, 0
    config.data.near_duplicates = 0.5
    return config


def build(point: Point) -> ml_collections.ConfigDict:
    return allocated(float(point.value), base(), plain(engram_tiny.get_config()))


def allocated(
    rho: float, budget: ml_collections.ConfigDict, variant: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """The pure MoE of a budget for rho = 1, else the variant with its experts and rows solved."""
    if rho == 1:
        return budget
    solved = budgets.solve(parse_config(budget), parse_config(variant), rho)
    return ml_collections.ConfigDict(to_dict(solved))


def pair(
    name: str, title: str, shape: Callable[[ml_collections.ConfigDict], ml_collections.ConfigDict]
) -> Experiment:
    """The demo's MoE, and Engram at equal budgets with the share PAIR_RHO of experts, both of them
    `plain` and given another shape; three seeds at the learning rate that this sweep found."""

    def base() -> ml_collections.ConfigDict:
        return shape(plain(moe_tiny.get_config()))

    def build(point: Point) -> ml_collections.ConfigDict:
        rho = 1 if point.value == "moe" else PAIR_RHO
        return allocated(rho, base(), shape(plain(engram_tiny.get_config())))

    points = tuple(Point("variant", n.lower(), n, n) for n in ("MoE", "Engram"))
    return Experiment(
        name=name,
        title=title,
        base=base,
        build=build,
        points=points,
        baseline="variant=moe",
        seeds=(0, 1, 2),
        rates=dict.fromkeys(("MoE", "Engram"), (8e-3,)),
        tune={point.family: point.name for point in points},
        axis="",
    )


def point_at(key: str, rho: float) -> Point:
    """rho = 1 and below are two families: each has learning rates of its own."""
    return Point(key, rho, "allocation", "MoE" if rho == 1 else "Engram")


EXPERIMENT = Experiment(
    name="allocation",
    title="Sparsity allocation: held-out loss by the routed experts' share of sparse parameters",
    base=base,
    build=build,
    points=tuple(point_at("rho", rho) for rho in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)),
    baseline="rho=1",
    seeds=(0, 1, 2),
    rates={"MoE": (4e-3, 8e-3, 16e-3), "Engram": (4e-3, 8e-3, 16e-3)},
    tune={"MoE": "rho=1", "Engram": "rho=0.7"},
    axis="rho: routed experts' share of the sparse parameters",
    column="rho",
    free=point_at,
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
