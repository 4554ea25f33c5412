"""Which sequences an analysis reads, and how many at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.analysis.texts import ACTIVATIONS, batch_shape, batches_of, spread
from engram_jax.data.array_store import array_store
from engram_jax.data.packing import PackedSequences
from tests.runs import configuration
from tests.tiny import VOCAB, tiny_config


@pytest.fixture(scope="module")
def store():
    rng = np.random.default_rng(0)
    return array_store([rng.integers(1, VOCAB, n) for n in (37, 5, 61, 90, 2)], VOCAB)


def test_every_sequence_once_and_padding_behind(store):
    config = tiny_config()
    text, size = batches_of(store, config), config.data.batch_size
    sequences = PackedSequences(store, config.data.seq_len, 0, pad_tail=True)
    whole = sequences.batch(np.arange(len(sequences)))
    batches = list(text)
    assert all(batch["tokens"].shape == (size, config.data.seq_len) for batch in batches)
    for key, wanted in whole.items():
        found = np.concatenate([batch[key] for batch in batches])
        np.testing.assert_array_equal(found[: len(wanted)], wanted)
        assert not found[len(wanted) :].any() or key == "tokens"
    assert text.tokens == (whole["segments"] > 0).sum()  # the last token is a target only
    assert [b["tokens"].sum() for b in text] == [b["tokens"].sum() for b in batches]


def test_places_are_those_of_the_tokens(store):
    config = tiny_config()
    positions = np.array([0, 3, 19, 20, 41, 42, 99, 180])
    numbers = np.unique(positions // config.data.seq_len)
    text, found = batches_of(store, config, numbers=numbers), []
    for batch, places in text.with_places(positions):
        assert len(places) == len(batch["tokens"])
        for row, at in zip(batch["tokens"], places, strict=True):
            found += row[at].tolist()
    assert found == store.tokens[positions].tolist()


def test_some_are_spread_evenly(store):
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(10, 2).tolist() == [2, 7]
    for there, wanted in ((903, 256), (7, 3), (1000, 999)):
        found = spread(there, wanted)
        assert len(np.unique(found)) == wanted and found[0] >= 0 and found[-1] < there
        assert np.diff(found).max() - np.diff(found).min() <= 1
    text = batches_of(store, tiny_config(), most=75)
    assert text.numbers.tolist() == spread(10, 3).tolist() and text.tokens == 60


def test_large_models_read_less_at_a_time():
    """About the states of all layers and a quarter's scores of attention are within the bound."""
    tiny = configuration("engram_tiny")
    assert batch_shape(tiny, 1, 64)[1] == 64
    config = configuration("engram27b")
    size, length = batch_shape(config, 8, config.data.seq_len)
    assert size == 8 and 128 <= length < config.data.seq_len
    model = config.model
    states = 4 * length * model.d_model * model.layers
    scores = 4 * model.attention.heads * length * max(length // 4, 128)
    assert states + scores < ACTIVATIONS
    data = dataclasses.replace(tiny.data, batch_size=6)
    assert batch_shape(dataclasses.replace(tiny, data=data), 2, 64)[0] == 6
