"""Engram-40B (paper, Table 1): Engram-27B with 3.2 times the memory.

39.47 B parameters, 18.53 B of them in the tables.

    python launch.py --config=configs/engram40b.py --mode=describe

The paper's result: Pile loss 1.942, validation loss 1.610. Not trained by us.
"""

import ml_collections

from configs import engram27b


def get_config() -> ml_collections.ConfigDict:
    config = engram27b.get_config()
    config.name = "engram40b"
    config.model.engram.rows_per_head = (7_239_680,)
    return config
