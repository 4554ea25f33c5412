"""MoE and Engram of equal budgets with 256 tokens of context, to be extended to 2,048.

    python launch.py --mode=sweep --config=configs/experiments/short_context.py
    python launch.py --mode=sweep --config=configs/experiments/long_context.py

The demo's models and text (Python's standard library, 3 MB) with a third of synthetic tasks, among
them needle and variable tracking in RULER's words (docs/lab_data.md). 1,000 steps of 8 x 256
tokens; long_context.py goes on from here, and docs/results/long-context.md has both.
"""

import ml_collections

from configs import engram_tiny, moe_tiny
from configs.experiments import allocation
from engram_jax.lab.experiment import Experiment, Point

RHO = 0.7
VARIANTS = (
    Point("variant", "moe", "MoE", "MoE"),
    Point("variant", "engram", "Engram", "Engram"),
)
SEEDS = (0, 1, 2)


def short(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The demo's configuration with 256 tokens of context and tasks."""
    allocation.plain(config)
    config.data.max_megabytes = 3
    config.data.seq_len, config.data.batch_size = 256, 8
    config.data.tasks.names = ("ruler_needle", "ruler_tracking", "needle", "tracking", "copying")
    config.data.tasks.share = 0.3
    config.train.steps = 1000
    config.train.checkpoint_every = config.train.eval_every = 250
    config.optimizer.warmup_steps = 70
    return config


def base() -> ml_collections.ConfigDict:
    """The budget: the pure MoE."""
    return short(moe_tiny.get_config())


def build(point: Point) -> ml_collections.ConfigDict:
    rho = 1 if point.value == "moe" else RHO
    return allocation.allocated(rho, base(), short(engram_tiny.get_config()))


EXPERIMENT = Experiment(
    name="short_context",
    title="MoE and Engram with 256 tokens of context",
    base=base,
    build=build,
    points=VARIANTS,
    baseline="variant=moe",
    seeds=SEEDS,
    rates={"MoE": (8e-3,), "Engram": (8e-3,)},
    tune={"MoE": "variant=moe", "Engram": "variant=engram"},
    axis="",
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
