"""The demo: a complete Engram model that learns real text on two CPU cores in minutes.

    make demo        (= python launch.py --config=configs/engram_tiny.py)

Every part of the big models is here: compressed tokenizer, hashed 2- and 3-grams at layers 1 and 3,
context gate and short convolution, four mHC streams, MLA, shared and routed experts, Muon.
"""

import ml_collections

from configs import moe_tiny


def get_config() -> ml_collections.ConfigDict:
    config = moe_tiny.get_config()
    config.name = "engram_tiny"
    model = config.model
    model.ffn.dense_dim = 384
    model.ffn.routed_experts = 12
    engram = model.engram
    engram.layers = (1, 3)  # 0-based
    engram.orders = (2, 3)
    engram.heads_per_order = 4
    engram.rows_per_head = (4234,)
    engram.d_mem = 128
    return config
