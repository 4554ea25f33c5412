"""F-gram addresses against a Python dict: the longest frequent n-gram of the same document."""

import dataclasses

import jax
import numpy as np
import pytest

from engram_jax.addressing import (
    BatchAddresser,
    as_stored,
    build_addressing,
    check_same,
    hash_jax,
    hash_numpy,
)
from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.fgrams import FgramAddressing, evenly
from engram_jax.addressing.hash_tokens import Hasher
from engram_jax.config import Config, EngramConfig, ModelConfig, TokenizerConfig
from engram_jax.config.errors import UserError

VOCAB = 7
jitted = jax.jit(
    lambda ids, segments, history, layer: hash_jax.addresses(ids, layer.value, segments, history),
    static_argnums=3,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    value: FgramAddressing


def random_layer(sizes, seed=0) -> FgramAddressing:
    """sizes: f-grams of each order from 2 up, drawn without repetition."""
    rng = np.random.default_rng(seed)
    orders, tables = tuple(range(2, len(sizes) + 2)), []
    for n, size in zip(orders, sizes, strict=True):
        chosen = np.sort(rng.choice(VOCAB**n, size, replace=False))
        tables.append(np.stack(np.unravel_index(chosen, (VOCAB,) * n), axis=1).astype(np.int32))
    return FgramAddressing(0, orders, sum(sizes), tuple(tables))


def by_dict(ids, layer, segments) -> list[int]:
    """One sequence: the row of the longest f-gram that ends at each token, K where none does."""
    grams = [tuple(map(int, gram)) for table in layer.ngrams for gram in table]
    rows = {gram: row for row, gram in enumerate(grams)}
    found = []
    for t in range(len(ids)):
        own = layer.count
        for n in layer.orders:
            window = range(t - n + 1, t + 1)
            if window[0] >= 0 and all(segments[s] == segments[t] for s in window):
                own = rows.get(tuple(int(ids[s]) for s in window), own)
        found.append(own)
    return found


@pytest.mark.parametrize("sizes", [(1,), (49,), (8, 30), (20, 0, 64), (0, 17), (31, 33, 1)])
def test_every_form_equals_a_dict(sizes):
    layer, rng = random_layer(sizes), np.random.default_rng(3)
    ids = rng.integers(0, VOCAB, (4, 60)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.03] = -2  # masked
    ids[rng.random(ids.shape) < 0.03] = VOCAB + 9  # none of the text's
    segments = np.cumsum(rng.random(ids.shape) < 0.1, axis=1).astype(np.int32)
    expected = np.array([by_dict(*row) for row in zip(ids, [layer] * 4, segments, strict=True)])
    assert len(np.unique(expected)) > 1
    found = [
        hash_numpy.addresses(ids, layer, segments),
        np.asarray(jitted(ids, segments, None, Static(layer))),
        BatchAddresser(addressing(layer))(ids, segments)["0"],
    ]
    for form in found:
        assert form.shape == (*ids.shape, 1)
        np.testing.assert_array_equal(form[..., 0], expected)


def addressing(layer) -> Addressing:
    return Addressing(None, VOCAB, 0, {0: layer}, "paper", -1, "")


@pytest.mark.parametrize("sizes", [(20,), (20, 64), (9, 9, 200)])
def test_a_history_continues_a_document(sizes):
    """Token by token and in chunks, on the device and for serving, equals the whole document."""
    layer = random_layer(sizes)
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 24)).astype(np.int32)
    expected = np.array([by_dict(row, layer, np.zeros(24)) for row in ids])
    past, hasher = layer.max_ngram - 1, Hasher(addressing(layer))
    before = np.repeat(hasher.empty()[None], 2, axis=0)
    np.testing.assert_array_equal(before, hash_jax.empty_history(layer, (2,)))
    start = 0
    for take in (1, 1, 5, 1, 16):
        new = ids[:, start : start + take]
        both = np.concatenate([before, hasher.canonical(new)], axis=1)
        on_device = jitted(new, None, before, Static(layer))
        for found in (np.asarray(on_device), hasher.addresses("0", both)):
            np.testing.assert_array_equal(found[..., 0], expected[:, start : start + take])
        before, start = both[:, both.shape[1] - past :], start + take
    assert start == 24


def test_lists_that_are_no_sorted_sets_are_refused():
    good = random_layer((5, 6))
    for broken in (
        (good.ngrams[0][::-1], good.ngrams[1]),
        (good.ngrams[0][[0, 1, 2, 3, 3]], good.ngrams[1]),
        (good.ngrams[1], good.ngrams[0]),
        (good.ngrams[0][:4], good.ngrams[1]),
    ):
        with pytest.raises(ValueError, match="f-grams"):
            FgramAddressing(0, (2, 3), 11, broken)
    with pytest.raises(ValueError, match="not been counted"):
        hash_numpy.addresses(np.zeros((1, 3), int), FgramAddressing(0, (2, 3), 11))


def configuration(**keys) -> Config:
    engram = EngramConfig(
        layers=(0,), form="scone", heads_per_order=1, rows_per_head=(11,), d_mem=8, **keys
    )
    return Config(tokenizer=TokenizerConfig(vocab_size=VOCAB), model=ModelConfig(engram=engram))


def test_the_list_is_stored_and_compared(tmp_path):
    mine = build_addressing(configuration())
    assert mine.layers[0].rows == 12 and mine.layers[0].ngrams is None
    layer = random_layer((5, 6))
    counted = dataclasses.replace(mine, layers={0: layer})
    (tmp_path / "tokenizer.json").write_text("{}")
    assert as_stored(mine, tmp_path) is mine  # nothing is stored
    counted.save(tmp_path / "addressing")
    stored = Addressing.load(tmp_path / "addressing")
    check_same(stored, counted)
    for ours, theirs in zip(layer.ngrams, stored.layers[0].ngrams, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Who reads a table takes the list from there.
    np.testing.assert_array_equal(as_stored(mine, tmp_path).layers[0].ngrams[1], layer.ngrams[1])
    another = dataclasses.replace(mine, layers={0: random_layer((5, 6), seed=1)})
    with pytest.raises(UserError, match="layers"):
        check_same(stored, another)
    with np.load(tmp_path / "addressing" / "addressing.npz") as file:
        arrays = dict(file)
    arrays["fgrams_3"][0, 0] = 0
    arrays["fgrams_3"][0, 1:] = 0
    np.savez(tmp_path / "addressing" / "addressing.npz", **arrays)
    with pytest.raises(UserError, match="damaged"):
        Addressing.load(tmp_path / "addressing")


def test_ids_are_not_compressed(small_tokenizer):
    config = configuration()
    tokens = dataclasses.replace(config.tokenizer, vocab_size=9)
    found = build_addressing(dataclasses.replace(config, tokenizer=tokens), small_tokenizer)
    assert found.compression is None and found.canonical_vocab_size == 9
    tokens = dataclasses.replace(tokens, canonical_vocab_size=6)
    with pytest.raises(UserError, match="canonical_vocab_size = 6"):
        build_addressing(dataclasses.replace(config, tokenizer=tokens), small_tokenizer)


def test_made_up_lists_have_the_shapes_of_counted_ones():
    made = evenly(FgramAddressing(0, (2, 3), 11))
    assert [table.shape for table in made.ngrams] == [(6, 2), (5, 3)]
