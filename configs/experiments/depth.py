"""A pair to look inside: a MoE of 8 layers, and Engram at equal parameters and FLOPs.

    python launch.py --mode=sweep --config=configs/experiments/depth.py
    python launch.py --config=configs/experiments/depth.py:variant=engram,seed=1

For LogitLens, the similarity of layers and what the memory owns (docs/results/depth): twice the
demo's depth, its width, the memory at layers 1 and 4 (the paper's are the 2nd and the 15th of 30,
section 4.1). A fifth of the training text are synthetic tasks (docs/lab_data.md), so that it can be
asked which of them need the memory. The learning rate is the one that configs/experiments/
allocation.py found for both families. 700 steps of 16 x 128 tokens of 2 MB of text (1.5 epochs),
about 20 minutes a run on 2 cores.
"""

import ml_collections

from configs.experiments import allocation


def deep(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The demo's configuration with twice the layers, trained longer and on tasks, too."""
    config.model.layers = 8
    if config.model.engram.layers:
        config.model.engram.layers = (1, 4)
    config.data.max_megabytes = 2
    config.data.tasks.names = ("facts", "needle", "tracking", "copying")
    config.data.tasks.share = 0.2
    config.train.steps = 700
    config.optimizer.warmup_steps = 70
    return config


EXPERIMENT = allocation.pair(
    "depth", "A pair of 8 layers: MoE, and Engram at equal parameters and FLOPs", deep
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
