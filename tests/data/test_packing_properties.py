"""Packing of any documents against a loop over their tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_jax.data.packing import PackedSequences
from engram_jax.data.token_store import TokenStore, write_store
from tests.properties import examples

EOS, PAD, VOCAB = 1, 0, 9
KEYS = ("tokens", "targets", "loss_mask", "segments", "positions")


def stored(folder: str, documents: list[list[int]]) -> TokenStore:
    vocabulary = {"[UNK]": PAD, "[EOS]": EOS} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = (" ".join(f"w{i}" for i in document) for document in documents)
    write_store(Path(folder), texts, tokenizer, EOS, VOCAB)
    return TokenStore(Path(folder))


def expected(documents: list[list[int]], length: int, number: int, count: int) -> dict[str, list]:
    """Sequence `number` of `count`, by what each of its positions is."""
    flat = [
        (token, which, place)
        for which, document in enumerate(documents)
        for place, token in enumerate([*document, EOS])
    ]
    out: dict[str, list] = {key: [] for key in KEYS}
    at_start, segment = number * length, 0
    for at in range(at_start, at_start + length):
        if number >= count or at >= len(flat):
            values = (PAD, 0, 0.0, 0, 0)
        else:
            token, which, place = flat[at]
            first = at == at_start or place == 0
            segment += first
            position = min(place, at - at_start)
            same = at + 1 < len(flat) and flat[at + 1][1] == which
            values = (token, flat[at + 1][0] if same else 0, float(same), segment, position)
        for key, value in zip(KEYS, values, strict=True):
            out[key].append(value)
    return out


tokens = st.integers(2, VOCAB - 1)
corpora = st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=12)


@examples(150)
@given(
    documents=corpora,
    length=st.integers(1, 9),
    pad_tail=st.booleans(),
    order=st.lists(st.integers(0, 30), min_size=1, max_size=8),
)
def test_any_sequences_in_any_order(documents, length, pad_tail, order):
    with tempfile.TemporaryDirectory() as folder:
        packed = PackedSequences(stored(folder, documents), length, PAD, pad_tail)
        predicted = sum(len(document) + 1 for document in documents) - 1
        count = -(-predicted // length) if pad_tail else predicted // length
        assert len(packed) == count
        batch = packed.batch(order)
        rows = [expected(documents, length, number, count) for number in order]
        for key in KEYS:
            np.testing.assert_array_equal(batch[key], [row[key] for row in rows], err_msg=key)


@examples(150)
@given(documents=corpora, length=st.integers(1, 9), pad_tail=st.booleans())
def test_every_token_is_the_target_of_one_position(documents, length, pad_tail):
    """Read in order, what counts is each document without its first token; what is left out at the
    end is less than a sequence."""
    with tempfile.TemporaryDirectory() as folder:
        packed = PackedSequences(stored(folder, documents), length, PAD, pad_tail)
        batch = packed.batch(np.arange(len(packed)))
    targets = batch["targets"][batch["loss_mask"] == 1].tolist()
    wanted = [token for document in documents for token in [*document, EOS][1:]]
    assert targets == wanted[: len(targets)]
    assert len(targets) == packed.targets()
    if pad_tail:
        assert targets == wanted
    else:
        assert len(wanted) - len(targets) < length
