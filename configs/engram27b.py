"""Engram-27B (paper, Table 1): 26.73 B parameters, 3.84 B active, 5.79 B of them in the tables.

    python launch.py --config=configs/engram27b.py --mode=describe

17 of MoE-27B's 72 routed experts per layer make room for two tables: rho = 74.3 % of the sparse
parameters stay experts. Training as configs/dense4b.py. The paper's result: Pile loss 1.950,
validation loss 1.622. Not trained by us.
"""

import ml_collections

from configs import moe27b


def get_config() -> ml_collections.ConfigDict:
    config = moe27b.get_config()
    config.name = "engram27b"
    config.model.ffn.routed_experts = 55
    engram = config.model.engram
    # 0-based: the paper's layers 2 and 15 (it counts from 1).
    engram.layers = (1, 14)
    engram.orders = (2, 3)
    engram.heads_per_order = 8
    engram.rows_per_head = (2_262_400,)
    engram.d_mem = 1280
    return config
