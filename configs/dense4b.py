"""Dense-4B: the paper's dense baseline (Table 1, Appendix A): 4.13 B parameters, 3.80 B active.

    python launch.py --config=configs/dense4b.py --mode=describe

Hardware: a TPU slice or a GPU node; 262 B tokens (50,000 steps of 1280 x 4096). The paper's result:
Pile loss 2.091, validation loss 1.768. Not trained by us.
"""

import ml_collections

from engram_jax.config import default_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = default_config_dict()
    config.name = "dense4b"

    # DeepSeek-V3's tokenizer compresses to 98,627 canonical ids. Training needs its file
    # (--config.tokenizer.path=.../tokenizer.json) and refuses one that compresses differently.
    config.tokenizer.name = "deepseek-v3"
    config.tokenizer.vocab_size = 129_280
    config.tokenizer.canonical_vocab_size = 98_627
    config.tokenizer.pad_id = 2

    model = config.model
    model.layers = 30
    model.d_model = 2560
    model.dtype = "bfloat16"
    model.remat = "block"
    model.attention.heads = 32
    model.attention.kv_lora_rank = 512
    model.attention.nope_dim = 128
    model.attention.rope_dim = 64
    model.attention.v_dim = 128
    model.hyper.streams = 4
    model.ffn.dense_dim = 12_288
    model.ffn.dense_layers = 30

    # C4 as prepared elsewhere, below $TFDS_DATA_DIR (its builder needs Apache Beam). Or any other
    # TFDS text data set, or a folder: --config.data.source=folder --config.data.path=...
    config.data.source = "tfds"
    config.data.path = "c4/en"
    config.data.seq_len = 4096
    config.data.batch_size = 1280

    # The fastest mesh on v5p:4x4x8 by prediction (docs/scaling.md): two replicas, each sharded over
    # half of the devices. v5e:16x16 needs microbatches, too: --config.train.accumulation=5.
    config.mesh.data = 2
    config.train.steps = 50_000
    config.optimizer.peak_lr = 4e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.1
    return config
