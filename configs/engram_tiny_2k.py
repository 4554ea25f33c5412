"""The demo's long-context stage: 2,048 tokens, from a trained configs/engram_tiny.py.

    python launch.py --config=configs/engram_tiny.py
    python launch.py --config=configs/engram_tiny_2k.py

configs/engram27b_32k.py at a size for two CPU cores: 16 times the demo's 128 tokens by YaRN, half
of the sequences parts of long documents, 0.4 M tokens.
"""

import ml_collections

from configs import engram_tiny


def get_config() -> ml_collections.ConfigDict:
    config = engram_tiny.get_config()
    config.name = "engram_tiny_2k"
    config.train.init_from = "runs/engram_tiny"
    yarn = config.model.attention.yarn
    yarn.scale, yarn.original_length = 16.0, 128
    config.data.seq_len = 2048
    config.data.batch_size = 2
    config.data.keep_long, config.data.long_share = True, 0.5
    config.train.steps = 100
    config.train.checkpoint_every = 50
    config.train.eval_every = 50
    config.train.eval_batches = 4
    config.optimizer.schedule = "constant"
    config.optimizer.peak_lr = 4e-4
    config.optimizer.warmup_steps = 10
    return config
