"""A complete model small enough to be compared number by number, shared by many tests."""

import dataclasses
from functools import lru_cache

import jax
import numpy as np

from engram_jax import config as config_lib
from engram_jax.addressing import build_addressing
from engram_jax.addressing.fgrams import FgramAddressing
from engram_jax.data.fgram_counts import most_frequent
from engram_jax.training.state import build_training, init_state

VOCAB, CANONICAL = 61, 50


def tiny_config(**overrides):
    """Dense layer 0, MoE 1 and 2, Engram at 1: few layers compile soon. Overrides by dotted key."""
    values = config_lib.default_config_dict()
    values.update_from_flattened_dict(
        {
            "tokenizer.vocab_size": VOCAB,
            "tokenizer.canonical_vocab_size": CANONICAL,
            "model.d_model": 16,
            "model.layers": 3,
            "model.init_std": 0.2,
            "model.attention.heads": 2,
            "model.attention.kv_lora_rank": 8,
            "model.attention.nope_dim": 8,
            "model.attention.rope_dim": 4,
            "model.attention.v_dim": 6,
            "model.hyper.streams": 3,
            "model.ffn.dense_dim": 24,
            "model.ffn.routed_experts": 5,
            "model.ffn.shared_experts": 1,
            "model.ffn.top_k": 2,
            "model.ffn.expert_dim": 12,
            "model.engram.layers": (1,),
            "model.engram.heads_per_order": 2,
            "model.engram.rows_per_head": (37,),
            "model.engram.d_mem": 16,
            "model.engram.init_std": 0.5,
            "data.seq_len": 20,
            "data.batch_size": 4,
            "train.steps": 60,
            "optimizer.warmup_steps": 2,
            "optimizer.peak_lr": 1e-2,
            **overrides,
        }
    )
    return config_lib.parse_config(values)


def tiny_addressing(config):
    """The configuration's addressing with an arbitrary surjection as compression."""
    if not config.model.engram.layers:
        return None
    if config.model.engram.form == "scone":  # of the text of random_batch(seed=0), a document
        tokens, starts = random_batch(config)["tokens"].ravel(), np.array([0, 80])
        engram = config.model.engram
        tables, _ = most_frequent(tokens, starts, engram.orders, engram.rows_per_head[0], VOCAB)
        layer = FgramAddressing(0, engram.orders, engram.rows_per_head[0], tables)
        return dataclasses.replace(build_addressing(config, None), layers={0: layer})
    rng = np.random.default_rng(5)
    compression = np.concatenate(
        [np.arange(CANONICAL), rng.integers(0, CANONICAL, VOCAB - CANONICAL)]
    )
    compression = rng.permutation(compression).astype(np.int32)
    found = build_addressing(config, None)
    return dataclasses.replace(found, compression=compression)


# The memories with other addresses than hashes: frequent n-grams at the input, product keys.
NEIGHBOURS = {
    "tokenizer.canonical_vocab_size": 0,
    "model.engram.form": "scone",
    "model.engram.layers": (0,),
    "model.engram.heads_per_order": 1,
    "model.engram.rows_per_head": (50,),
    "model.product_keys.layers": (1,),
    "model.product_keys.sub_keys": 6,
    "model.product_keys.key_dim": 8,
    "model.product_keys.heads": 2,
    "model.product_keys.top_k": 4,
    "model.product_keys.dim": 10,
    "model.product_keys.expansion": 2,
}


@lru_cache
def tiny(seed=0, **overrides):
    """(program, state) with every parameter, tap and bias away from its special starting value."""
    config = tiny_config(**overrides)
    program = build_training(config, tiny_addressing(config))
    state = init_state(program)  # not compiled as a whole: its parts are the same in most models
    rng = np.random.default_rng(seed)

    def shake(x):
        return x + rng.normal(0, 0.3, x.shape).astype(x.dtype)

    return program, dataclasses.replace(
        state,
        params=jax.tree.map(shake, state.params),
        router_bias=jax.tree.map(shake, state.router_bias),
    )


def random_batch(config, seed=0, documents=0.2, accumulate_padding=False):
    """A packed batch as the data pipeline makes it. documents: the share of tokens that begin one,
    beside the first; False = none."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_len)
    tokens = rng.integers(0, VOCAB, (shape[0], shape[1] + 1)).astype(np.int32)
    first = rng.random(shape) < documents
    first[:, 0] = True
    segments = np.cumsum(first, axis=1).astype(np.int32)
    index = np.arange(shape[1])
    starts = np.maximum.accumulate(np.where(first, index, 0), axis=1)
    mask = np.ones(shape, np.float32)
    mask[:, :-1] = segments[:, 1:] == segments[:, :-1]
    if accumulate_padding:
        segments[-1, -5:], mask[-1, -6:] = 0, 0
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(mask > 0, tokens[:, 1:], 0).astype(np.int32),
        "loss_mask": mask,
        "segments": segments,
        "positions": (index - starts).astype(np.int32),
    }
