"""The memory of the released DeepSeek-V4.1-Flash.

Orders 2-4, 384,006,168 and 384,016,682 rows of 256.

    python launch.py --config=configs/deepseek_v41_memory.py --mode=describe

For --mode=describe and addressing: the memory (orders, heads, primes, multipliers, row width,
module form, mHC width 4 x 5120) is the release's, the backbone around it is a placeholder of 15
dense layers of that width.
"""

import ml_collections

from engram_jax.config import default_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = default_config_dict()
    config.name = "deepseek_v41_memory"
    config.tokenizer.name = "deepseek-v4"
    config.tokenizer.vocab_size = 129_280
    config.tokenizer.canonical_vocab_size = 99_092
    config.tokenizer.pad_id = 2

    model = config.model
    model.layers = 15
    model.d_model = 5120
    model.dtype = "bfloat16"
    model.hyper.streams = 4
    model.hyper.transpose = True
    model.hyper.norm_gain = False
    model.ffn.dense_layers = 15

    engram = model.engram
    engram.layers = (1, 14)  # 0-based, as in the release's configuration
    engram.orders = (2, 3, 4)
    engram.heads_per_order = 8
    engram.rows_per_head = (16_000_000,)
    engram.d_mem = 6144
    engram.form = "v41"
    return config
