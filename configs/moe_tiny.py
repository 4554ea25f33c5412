"""The demo's baseline: engram_tiny's parameters and FLOPs, with more experts instead of tables.

    python launch.py --config=configs/moe_tiny.py

The dense layer is wider than engram_tiny's by what the Engram projections cost, so that both
multiply every token with the same number of weights.
"""

import ml_collections

from engram_jax.config import default_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = default_config_dict()
    config.name = "moe_tiny"

    model = config.model
    model.layers = 4
    model.d_model = 128
    model.attention.heads = 4
    model.attention.kv_lora_rank = 64
    model.attention.nope_dim = 32
    model.attention.rope_dim = 16
    model.attention.v_dim = 32
    model.hyper.streams = 4
    model.ffn.dense_dim = 814
    model.ffn.dense_layers = 1
    model.ffn.routed_experts = 22
    model.ffn.shared_experts = 1
    model.ffn.top_k = 3
    model.ffn.expert_dim = 96

    config.tokenizer.vocab_size = 2048
    config.data.seq_len = 128
    config.data.batch_size = 16
    config.data.validation_fraction = 0.05

    config.optimizer.peak_lr = 4e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 400
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.eval_batches = 16
    config.train.checkpoint_every = 100
    config.train.count_models = True
    config.generate.max_tokens = 64
    config.train.samples = ("def main(", "The following example shows")
    return config
