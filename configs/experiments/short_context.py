"""MoE and Engram of equal budgets with 256 tokens of context, to be extended to 2,048.

    python launch.py --mode=sweep --config=configs/experiments/short_context.py
    python launch.py --mode=sweep --config=configs/experiments/long_context.py

The demo's models and text (Python's standard library, 3 MB) with three tenths of synthetic tasks,
among them needle and variable tracking in RULER's words (docs/lab_data.md). 1,000 steps of 8 x 256
tokens; long_context.py goes on from here.
"""

import ml_collections

from configs.experiments import allocation


def short(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The demo's configuration with 256 tokens of context and tasks."""
    config.data.max_megabytes = 3
    config.data.seq_len, config.data.batch_size = 256, 8
    config.data.tasks.names = ("ruler_needle", "ruler_tracking", "needle", "tracking", "copying")
    config.data.tasks.share = 0.3
    config.train.steps = 1000
    config.train.checkpoint_every = config.train.eval_every = 250
    config.optimizer.warmup_steps = 70
    return config


EXPERIMENT = allocation.pair("short_context", "MoE and Engram with 256 tokens of context", short)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
