"""Engram-27B's long-context stage (paper, section 5): 32,768 tokens, 5,000 steps, 31 B tokens.

    python launch.py --config=configs/engram27b_32k.py --mode=compile --topology=v5p:4x4x8
    python launch.py --config=configs/engram27b_32k.py --config.train.init_from=runs/engram27b@50000

Weights and tables of a trained configs/engram27b.py go on with YaRN (docs/models.md), a fresh
optimizer and text of which half is whole sequences of long documents. The rate is where
pretraining's schedule ends; the paper gives none. Its results at 32,768 tokens: RULER's multi-query
needle 97.0, variable tracking 89.0 (MoE-27B: 84.2, 77.0). Not trained by us.
"""

import ml_collections

from configs import engram27b


def get_config() -> ml_collections.ConfigDict:
    config = engram27b.get_config()
    config.name = "engram27b_32k"
    config.train.init_from = "runs/engram27b"
    yarn = config.model.attention.yarn
    yarn.scale, yarn.original_length = 10.0, 4096
    yarn.alpha, yarn.beta, yarn.mscale = 1.0, 32.0, 0.707
    config.data.seq_len = 32_768
    config.data.batch_size = 192
    # Two devices share a sequence (docs/scaling.md), 64 such pairs share the weights.
    config.mesh.data, config.mesh.sequence = 1, 2
    config.data.keep_long, config.data.long_share = True, 0.5
    config.train.steps = 5000
    config.optimizer.schedule = "constant"
    config.optimizer.peak_lr = 4e-5
    config.optimizer.warmup_steps = 100
    return config
