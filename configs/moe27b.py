"""MoE-27B: the paper's baseline of the same size and cost as Engram-27B.

26.72 B parameters, 3.81 B active.

    python launch.py --config=configs/moe27b.py --mode=describe

Training as configs/dense4b.py. The paper's result: Pile loss 1.960, validation loss 1.634. Not
trained by us.
"""

import ml_collections

from configs import dense4b


def get_config() -> ml_collections.ConfigDict:
    config = dense4b.get_config()
    config.name = "moe27b"
    ffn = config.model.ffn
    ffn.dense_layers = 1
    ffn.routed_experts = 72
    ffn.shared_experts = 2
    ffn.top_k = 6
    ffn.expert_dim = 1536
    return config
