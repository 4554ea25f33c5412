"""The models of short_context.py extended from 256 to 2,048 tokens by a YaRN stage.

    python launch.py --mode=sweep --config=configs/experiments/short_context.py
    python launch.py --mode=sweep --config=configs/experiments/long_context.py

As configs/engram27b_32k.py does it (paper, section 4.3): weights and tables of the short model, a
fresh schedule, positions scaled by 8, half of the sequences whole parts of long documents. 100
steps of 4 x 2,048 tokens. Both in one working directory: a run begins with the run of its own
variant and seed under runs/short_context.
"""

import dataclasses

import ml_collections

from configs.experiments.short_context import EXPERIMENT as SHORT
from engram_jax.lab.experiment import Launch


def long(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A short model's configuration with 8 times the context."""
    yarn = config.model.attention.yarn
    yarn.scale, yarn.original_length = 8.0, config.data.seq_len
    config.data.seq_len, config.data.batch_size = 2048, 4
    config.data.keep_long, config.data.long_share = True, 0.5
    config.data.tasks.names = ("ruler_needle", "ruler_tracking")
    config.data.tasks.difficulties = ("easy", "hard")
    config.train.steps = 100
    config.train.checkpoint_every = config.train.eval_every = 50
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    return config


def source(launch: Launch) -> str:
    """The short model's run."""
    short = dataclasses.replace(launch, rate=SHORT.rates[launch.point.family][0])
    return f"runs/{SHORT.name}/{short.name}"


EXPERIMENT = dataclasses.replace(
    SHORT,
    name="long_context",
    title="Extended from 256 to 2,048 tokens by YaRN",
    base=lambda: long(SHORT.base()),
    build=lambda point: long(SHORT.build(point)),  # the short model's sizes
    rates={family: (rate / 10,) for family, (rate,) in SHORT.rates.items()},
    source=source,
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
