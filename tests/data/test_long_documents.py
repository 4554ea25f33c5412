"""Long documents in whole sequences, against an oracle that walks the documents token by token."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from engram_jax.config import Config, DataConfig
from engram_jax.config.errors import UserError
from engram_jax.data import pipeline
from engram_jax.data.array_store import array_store
from engram_jax.data.long_documents import LongSequences, train_sequences
from engram_jax.data.packing import PackedSequences
from engram_jax.data.prepared import of_arrays

PAD = 0
LENGTHS = ([5, 1, 1, 9, 2], [1], [40], [3, 4, 5, 13, 1, 12, 2, 2], [8, 9, 4, 4])


def made(lengths):
    """A store of documents whose tokens are all different, and the documents."""
    ends = np.cumsum(lengths)
    documents = [list(range(end - n + 2, end + 2)) for end, n in zip(ends, lengths, strict=True)]
    return array_store(documents, 5000), documents


def oracle(documents, seq_len):
    """(the whole sequences with their last target, what remains of every document)."""
    whole, rest = [], []
    for document in documents:
        while len(document) > seq_len:
            whole.append(document[: seq_len + 1])
            document = document[seq_len:]
        if len(document) > 1:
            rest.append(document)
    return whole, rest


@pytest.mark.parametrize("seq_len", [1, 3, 4, 50])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sequences(lengths, seq_len):
    store, documents = made(lengths)
    sequences = pickle.loads(pickle.dumps(LongSequences(store, seq_len, PAD)))
    whole, rest = oracle(documents, seq_len)
    assert sequences.long == len(whole)
    packed = PackedSequences(array_store(rest, 5000), seq_len, PAD) if rest else []
    assert len(sequences) == len(whole) + len(packed)

    order = np.random.default_rng(0).permutation(len(sequences) + 2)
    found = sequences.batch(order)
    for row, number in enumerate(order):
        got = {name: values[row] for name, values in found.items()}
        if number < len(whole):
            assert got["tokens"].tolist() == whole[number][:-1]
            assert got["targets"].tolist() == whole[number][1:]
            assert got["loss_mask"].all() and (got["segments"] == 1).all()
            assert got["positions"].tolist() == list(range(seq_len))
        elif number < len(sequences):
            expected = packed.batch([number - len(whole)])
            for name, values in expected.items():
                np.testing.assert_array_equal(got[name], values[0])
        else:
            assert not got["segments"].any() and not got["loss_mask"].any()
    # Every target once, but those of the tail that fills no sequence.
    targets = found["targets"][found["loss_mask"] > 0]
    assert len(set(targets.tolist())) == len(targets)
    left = sum(n - 1 for n in lengths) - len(targets)
    assert 0 <= left < seq_len + len(rest) + 1


def config(**data) -> Config:
    return dataclasses.replace(Config(), data=DataConfig(seq_len=4, batch_size=5, **data))


def prepared(lengths):
    return of_arrays(made(lengths)[0], None, None)


LONG = [*[2] * 60, 41, 9, 30]  # 19 whole sequences and about 30 packed ones


def numbers_of(batches, sequences):
    """Of each row, the number of the sequence it is; every token stands in one."""
    every = sequences.batch(np.arange(len(sequences)))["tokens"]
    known = {tuple(row): number for number, row in enumerate(every.tolist())}
    return [[known[tuple(row)] for row in batch["tokens"].tolist()] for batch in batches]


@pytest.mark.parametrize("share", [0, 0.25, 0.7])
def test_the_share_and_the_order(share):
    """The share of every stretch of training; each kind in epochs; found again anywhere."""
    chosen, text = config(keep_long=True, long_share=share), prepared(LONG)
    sequences = train_sequences(text.store_train, chosen)
    stream = pipeline.train_batches(text, chosen)
    found = numbers_of([next(stream) for _ in range(40)], sequences)
    flat = np.concatenate(found)
    long = flat[flat < sequences.long]
    expected = share or sequences.long / len(sequences)
    assert abs(len(long) / len(flat) - expected) < 0.03
    whole = sequences.long
    assert sorted(long[:whole].tolist()) == list(range(whole)) or not share
    state = stream.get_state()
    ahead = numbers_of([next(stream) for _ in range(3)], sequences)
    stream.set_state(state)
    assert numbers_of([next(stream) for _ in range(3)], sequences) == ahead
    stream.close()
    for batches in (0, 1, 3, 7, 40):
        _, seen = pipeline.trained_sequences(text, chosen, batches)
        assert seen.tolist() == sorted({n for batch in found[:batches] for n in batch})


def test_without_it_nothing_changes():
    text = prepared(LONG)
    plain = pipeline.train_batches(text, config())
    assert "keep_long" not in plain.get_state()
    plain.close()
    assert isinstance(train_sequences(text.store_train, config()), PackedSequences)


def test_another_share_is_other_data():
    text = prepared(LONG)
    one = pipeline.train_batches(text, config(keep_long=True, long_share=0.5))
    other = pipeline.train_batches(text, config(keep_long=True))
    with pytest.raises(UserError, match=r"long_share = 0.5, this run has 0.0"):
        other.set_state(one.get_state())
    one.close()
    other.close()


def test_a_share_of_what_is_not_there():
    for lengths, words in (([4] * 30, "no document that is so long"), ([41] * 3, "nothing else")):
        with pytest.raises(UserError, match=rf"long_share = 0.5: .*{words}: must be 0"):
            train_sequences(prepared(lengths).store_train, config(keep_long=True, long_share=0.5))
