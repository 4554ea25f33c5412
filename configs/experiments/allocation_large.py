"""Sparsity allocation at four times the demo's FLOPs per token, 3 million tokens a run.

    python launch.py --mode=sweep --config=configs/experiments/allocation_large.py
    python launch.py --config=configs/experiments/allocation_large.py:rho=0.7,seed=1

As configs/experiments/allocation.py, with 6 layers of width 256, 22 experts of width 160 at rho = 1
and rows of 32: 4.1 times the demo's training FLOPs per token. 733 steps of 32 x 128 tokens, about
40 minutes a run on 2 cores.
"""

import ml_collections

from configs import engram_tiny, moe_tiny
from configs.experiments import allocation
from engram_jax.lab.experiment import Experiment, Point

RATES = (4e-3, 8e-3, 16e-3)


def large(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The demo's configuration, larger and trained longer."""
    model = allocation.plain(config).model
    model.layers = 6
    model.d_model = 256
    model.attention.heads = 8
    model.ffn.dense_dim = 1536
    model.ffn.expert_dim = 160
    model.engram.d_mem = 256
    config.data.batch_size = 32
    config.train.steps = 733
    config.optimizer.warmup_steps = 73
    return config


def base() -> ml_collections.ConfigDict:
    """The budget: the pure MoE."""
    return large(moe_tiny.get_config())


def build(point: Point) -> ml_collections.ConfigDict:
    return allocation.allocated(float(point.value), base(), large(engram_tiny.get_config()))


EXPERIMENT = Experiment(
    name="allocation_large",
    title="Sparsity allocation at four times the demo's FLOPs per token",
    base=base,
    build=build,
    points=tuple(allocation.point_at("rho", rho) for rho in (1.0, 0.85, 0.7, 0.55, 0.4)),
    baseline="rho=1",
    seeds=(0, 1, 2),
    rates={"MoE": RATES, "Engram": RATES},
    tune={"MoE": "rho=1", "Engram": "rho=0.7"},
    axis="rho: routed experts' share of the sparse parameters",
    column="rho",
    free=allocation.point_at,
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
