"""Geometries every form of the hash is tried on, and a tokenizer small enough to check by hand."""

from __future__ import annotations

import jax
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_jax.addressing import LayerAddressing, hash_jax, plan_layer
from engram_jax.config import EngramConfig

DEMO = EngramConfig(layers=(1, 15), rows_per_head=(646_400,), d_mem=1024)
V41 = EngramConfig(layers=(1, 14), orders=(2, 3, 4), rows_per_head=(16_000_000,), d_mem=6144)
QWEN = EngramConfig(layers=(1,), rows_per_head=(20_000_000,), d_mem=2560, hash_dialect="qwen")
QWEN_GOLDEN = EngramConfig(
    layers=(1,), heads_per_order=4, rows_per_head=(101,), d_mem=48, seed=1234, hash_dialect="qwen"
)
ENGRAM_27B = EngramConfig(layers=(1, 14), rows_per_head=(2_262_400,), d_mem=1280)
ENGRAM_40B = EngramConfig(layers=(1, 14), rows_per_head=(7_239_680,), d_mem=1280)
SMALLEST = EngramConfig(
    layers=(0, 3), orders=(2, 3, 4, 5), rows_per_head=(2, 3, 90, 5000), d_mem=256
)
LARGEST = EngramConfig(layers=(2,), heads_per_order=1, rows_per_head=(2**30 - 200, 2**29), d_mem=64)

ONE_ROW = EngramConfig(
    layers=(1, 2), heads_per_order=2, rows_per_head=(50,), d_mem=64, lookup="one_row"
)

# name -> (configuration, ids hashed, id before a document's start, id that restarts history)
GEOMETRIES: dict[str, tuple[EngramConfig, int, int, int | None]] = {
    "demo": (DEMO, 98_627, 2, None),
    "v41": (V41, 99_092, 2, None),
    "qwen": (QWEN, 248_320, 99, 99),
    "qwen_golden": (QWEN_GOLDEN, 997, 7, 7),
    "27b": (ENGRAM_27B, 98_627, 2, None),
    "40b": (ENGRAM_40B, 98_627, 2, None),
    "smallest": (SMALLEST, 11, 0, None),
    "largest": (LARGEST, 50_000, 1, None),
    "one_row": (ONE_ROW, 98_627, 2, None),
}


def planned(name: str) -> dict[int, LayerAddressing]:
    config, vocab, fill, restart = GEOMETRIES[name]
    return plan_layer(config, vocab, fill_id=fill, restart_id=restart)


# The jnp form as everybody runs it: compiled, the layer a constant.
jitted = jax.jit(hash_jax.addresses, static_argnums=1)


def word_level(tokens: list[str], special: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer whose id i decodes to tokens[i]; special tokens follow."""
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer
