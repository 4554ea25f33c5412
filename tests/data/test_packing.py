"""Token store and packing against an oracle that walks the documents token by token."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError
from engram_jax.data.packing import PackedSequences
from engram_jax.data.prepared import check_targets
from engram_jax.data.token_store import TokenStore, write_store

EOS, PAD = 1, 0


def make_store(
    folder, lengths: list[int], vocab_size: int = 5000
) -> tuple[TokenStore, list[list[int]]]:
    """A store of documents with the given numbers of tokens (eos included), every token
    different."""
    vocabulary = {f"w{i}": i for i in range(2, vocab_size)} | {"[UNK]": 0, "[EOS]": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    documents, token = [], 2
    for length in lengths:
        documents.append([*range(token, token + length - 1), EOS])
        token += length - 1
    folder.mkdir(parents=True)
    texts = (" ".join(f"w{i}" for i in document[:-1]) for document in documents)
    write_store(folder, texts, tokenizer, EOS, vocab_size)
    return TokenStore(folder), documents


def test_targets_are_counted_as_the_sequences_have_them(tmp_path):
    for number, lengths in enumerate(([5, 1, 1, 9, 2], [1], [1, 1, 1, 1, 1, 4], [40])):
        store, documents = make_store(tmp_path / str(number), lengths)
        for seq_len in (1, 3, 4, 50):
            for pad_tail in (True, False):
                sequences = PackedSequences(store, seq_len, PAD, pad_tail=pad_tail)
                found = [sum(s["loss_mask"]) for s in oracle(documents, seq_len, pad_tail)]
                for count in (*range(len(found) + 2), None):
                    assert sequences.targets(count) == sum(found[:count])


def test_a_text_without_targets_is_refused(tmp_path):
    """A tokenizer that strips what it does not know leaves the ends of documents alone."""
    check_targets("held-out", make_store(tmp_path / "some", [1, 2])[0], DataConfig())
    with pytest.raises(
        UserError, match=r"held-out text has no token to predict: 3 document\(s\), 3"
    ):
        check_targets("held-out", make_store(tmp_path / "none", [1, 1, 1])[0], DataConfig())


def oracle(documents: list[list[int]], seq_len: int, pad_tail: bool) -> list[dict[str, list]]:
    """Sequences by the definition, one position at a time."""
    flat = [(t, d, p) for d, document in enumerate(documents) for p, t in enumerate(document)]
    sequences, at = [], 0
    while at + seq_len < len(flat) or (pad_tail and at + 1 < len(flat)):
        rows: dict[str, list] = {
            k: [] for k in ("tokens", "targets", "loss_mask", "segments", "positions")
        }
        segment, position = 0, -1
        for i in range(at, at + seq_len):
            if i >= len(flat):
                values = (PAD, 0, 0.0, 0, 0)
            else:
                token, document, place = flat[i]
                starts = i == at or place == 0
                segment, position = (segment + 1, 0) if starts else (segment, position + 1)
                follows = i + 1 < len(flat) and flat[i + 1][1] == document
                target = flat[i + 1][0] if follows else 0
                values = (token, target, float(follows), segment, position)
            for key, value in zip(rows, values, strict=True):
                rows[key].append(value)
        sequences.append(rows)
        at += seq_len
    return sequences


LENGTHS = [
    [5, 1, 1, 9, 16, 2, 33, 7],
    [16, 16, 16],
    [17],
    [1, 1, 1, 1, 1, 1],
    [100],
    [15, 2, 15, 2, 64],
    [2],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("seq_len", [1, 4, 16])
@pytest.mark.parametrize("pad_tail", [False, True])
def test_against_the_oracle(tmp_path, lengths, seq_len, pad_tail):
    store, documents = make_store(tmp_path / "s", lengths)
    packed = PackedSequences(store, seq_len, PAD, pad_tail)
    expected = oracle(documents, seq_len, pad_tail)
    assert len(packed) == len(expected)
    if not expected:
        return
    batch = packed.batch(np.arange(len(packed)))
    for key in expected[0]:
        assert np.array_equal(batch[key], [rows[key] for rows in expected]), key
    dtypes = {key: value.dtype.name for key, value in batch.items()}
    assert dtypes.pop("loss_mask") == "float32"
    assert set(dtypes.values()) == {"int32"}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_token_is_a_target_once(tmp_path, lengths):
    """All but documents' first tokens are targets, once; training may leave out a tail shorter than
    T."""
    store, documents = make_store(tmp_path / "s", lengths)
    predictable = [token for document in documents for token in document[1:]]
    for pad_tail in (True, False):
        packed = PackedSequences(store, 4, PAD, pad_tail)
        batch = packed.batch(np.arange(len(packed)))
        targets = batch["targets"][batch["loss_mask"] == 1].tolist()
        if pad_tail:
            assert targets == predictable
        else:
            assert targets == predictable[: len(targets)]
            assert len(store) - 1 - 4 * len(packed) < 4
        assert (
            batch["tokens"][batch["segments"] > 0].tolist()
            == store.tokens[: (batch["segments"] > 0).sum()].tolist()
        )


def test_rows_past_the_end_are_padding(tmp_path):
    store, _ = make_store(tmp_path / "s", [20])
    packed = PackedSequences(store, 8, PAD, pad_tail=True)
    batch = packed.batch([len(packed), len(packed) + 5])
    assert not any(array.any() for array in batch.values())


def test_random_access_equals_reading_in_order(tmp_path):
    store, _ = make_store(tmp_path / "s", [7] * 40)
    packed = PackedSequences(store, 8, PAD)
    whole = packed.batch(range(len(packed)))
    order = np.random.default_rng(0).permutation(len(packed))
    for key, array in packed.batch(order).items():
        assert np.array_equal(array, whole[key][order])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_store_dtype_and_bytes(tmp_path, vocab_size, dtype):
    store, documents = make_store(tmp_path / "s", [4, 2, 3], vocab_size)
    assert store.tokens.dtype.name == dtype
    assert store.tokens.tolist() == [token for document in documents for token in document]
    assert store.starts.tolist() == [0, 4, 6, 9]
    assert (len(store), store.documents, store.eos_id) == (9, 3, EOS)
    text_bytes = len("w2 w3 w4") + len("w5") + len("w6 w7")
    assert store.text_bytes == text_bytes
    assert store.bytes_per_token == text_bytes / 9


def test_many_batches_of_text_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("engram_jax.data.token_store._BATCH_BYTES", 50)
    store, documents = make_store(tmp_path / "s", [5, 30, 2, 2, 2, 90, 3])
    assert store.tokens.tolist() == [token for document in documents for token in document]


def test_a_truncated_store_is_named_and_refused(tmp_path):
    store, _ = make_store(tmp_path / "s", [300])
    (tmp_path / "s" / "tokens.bin").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"tokens.bin: 100 bytes instead of 600"):
        _ = store.tokens


def test_a_copy_for_another_process_carries_no_tokens(tmp_path):
    store, _ = make_store(tmp_path / "s", [300])
    assert len(store.tokens) == 300
    copied = pickle.dumps(store)
    assert len(copied) < 500
    assert np.array_equal(pickle.loads(copied).tokens, store.tokens)
