"""The serving engine's hash against NumPy's authority."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.addressing import build_addressing
from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.addressing.hash_tokens import Hasher
from engram_jax.config import default_config_dict, parse_config

VOCAB = 1000


def addressing(dialect):
    values = default_config_dict()
    values.update_from_flattened_dict(
        {
            "tokenizer.vocab_size": VOCAB,
            "tokenizer.canonical_vocab_size": VOCAB if dialect == "qwen" else 700,
            "tokenizer.eos_id": 7,
            "tokenizer.pad_id": 3,
            "model.layers": 6,
            "model.engram.layers": (1, 4),
            "model.engram.orders": (2, 3, 4),
            "model.engram.heads_per_order": 3,
            "model.engram.rows_per_head": (9973,),
            "model.engram.d_mem": 36,
            "model.engram.hash_dialect": dialect,
        }
    )
    found = build_addressing(parse_config(values), None)
    if dialect == "qwen":
        return found
    compression = np.random.default_rng(0).integers(0, 700, VOCAB).astype(np.int32)
    return dataclasses.replace(found, compression=compression)


@pytest.mark.parametrize("dialect", ["paper", "qwen"])
@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5), (7,), (1, 20, 21)])
def test_tokens_in_any_portions_have_the_addresses_of_the_whole(dialect, cuts):
    given = addressing(dialect)
    hasher, rng = Hasher(given), np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (3, 30)).astype(np.int32)
    tokens[:, 4::9] = 7  # where dialect "qwen" restarts
    tokens[0, 11] = -5  # a masked token
    canonical = canonicalise(tokens, given.compression)
    history = np.stack([hasher.empty()] * 3)
    for start, end in zip((0, *cuts), (*cuts, 30), strict=True):
        new = hasher.canonical(tokens[:, start:end])
        np.testing.assert_array_equal(new, canonical[:, start:end])
        ids = np.concatenate([history, new], axis=1)
        for layer, plan in given.layers.items():
            found = hasher.addresses(str(layer), ids)
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, addresses(canonical, plan)[:, start:end])
        history = ids[:, -hasher.past :]


def test_ids_past_the_tokenizers_are_masked():
    hasher = Hasher(addressing("paper"))
    found = hasher.canonical(np.array([VOCAB - 1, VOCAB, 2**31 - 1, -9], np.int32))
    assert found[0] >= 0 and found[1:].tolist() == [-1, -1, -9]
