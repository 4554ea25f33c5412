"""Bytes of tokens, and losses per byte, against loops over the raw text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.config.errors import UserError
from engram_jax.data.token_store import TokenStore, bytes_of_tokens, write_store
from engram_jax.data.train_bpe import train_bpe
from engram_jax.evaluation.text_scores import (
    TextTargets,
    by_position,
    joined,
    parse_texts,
    scores,
    targets_of,
)

EOS = 2
TEXTS = (
    "plain words, plain words",
    "naïve café 1€",
    "漢字とかな、漢字とかな",
    "👩‍👩‍👧 and 🙂🙂 and 🇩🇪",
    "\n \n",
    "tab\tand\r\nline",
    "",
)


@pytest.fixture(scope="module")
def byte_level():
    """Bytes and a few merges: most CJK characters and emoji are several tokens."""
    return train_bpe(["plain words 漢字 and 🙂"] * 3, 290)


def byte_boundaries(text: str) -> list[int]:
    found = [0]
    for character in text:
        found.append(found[-1] + len(character.encode()))
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_byte_level_tokens(byte_level, text):
    """A byte-level token's string has a character per byte, which is the oracle: of a character
    that is spelt by several, the first has all bytes."""
    (encoding,) = encode_batch(byte_level, [text], offsets=True)
    found = bytes_of_tokens(text, encoding.offsets)
    assert found.dtype == np.int32 and found.sum() == len(text.encode())
    boundaries, read, had = byte_boundaries(text), 0, 0
    for token, size in zip(encoding.tokens, found, strict=False):
        read += len(token)
        whole = next(at for at in boundaries if at >= read)
        assert size == whole - had
        had = whole
    assert found[-1] == 0
    if "漢" in text:
        assert (found[:-1] == 0).any() and 3 in found


def test_bytes_of_what_a_tokenizer_does_not_spell():
    """Unknown words and stripped or normalised text are the bytes that were written."""
    tokenizer = Tokenizer(models.WordLevel({"ﬁ": 0, "fi": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = "  ﬁ 🙂漢字   fi \n"
    (encoding,) = encode_batch(tokenizer, [text], offsets=True)
    assert encoding.ids == [1, 2, 1]
    sizes = [len(part.encode()) for part in ("  ﬁ", " 🙂漢字", "   fi \n")]
    assert bytes_of_tokens(text, encoding.offsets).tolist() == [*sizes, 0]
    assert bytes_of_tokens("   ", []).tolist() == [3]


@pytest.fixture(scope="module")
def store(byte_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, TEXTS, byte_level, EOS, 300, text_of_tokens=True)
    return TokenStore(folder)


def by_hand(byte_level, seq_len):
    """(document, bytes, is an end, tokens of context) of every target, text by text."""
    rows, place = [], 0
    for number, text in enumerate(TEXTS):
        (encoding,) = encode_batch(byte_level, [text], offsets=True)
        boundaries, read, had = byte_boundaries(text), 0, 0
        begin = place
        for index in range(len(encoding.ids) + 1):
            end, size = index == len(encoding.ids), 0
            if not end:
                read += len(encoding.tokens[index])
                whole = next(at for at in boundaries if at >= read)
                size, had = whole - had, whole
            if index:
                # the sequence whose target this is has the tokens from here on
                first = (place - 1) // seq_len * seq_len
                rows.append((number, size, end, place - max(first, begin)))
            place += 1
    return rows


@pytest.mark.parametrize("seq_len", [5, 16])
def test_scores_against_a_loop(byte_level, store, seq_len):
    rows = by_hand(byte_level, seq_len)
    nats = np.random.default_rng(0).gamma(2.0, 1.0, len(rows))
    targets = targets_of(store, seq_len)
    found = scores(targets, nats)
    text = [(i, row) for i, row in enumerate(rows) if not row[2]]
    ends = [i for i, row in enumerate(rows) if row[2]]
    size = sum(row[1] for _, row in text)
    bits = sum(nats[i] for i, _ in text) / math.log(2)
    assert (found["tokens"], found["ends"], found["bytes"]) == (len(text), len(ends), size)
    firsts = [encode_batch(byte_level, [t])[0].ids[:1] for t in TEXTS]
    assert found["documents"] == sum(map(bool, firsts))
    assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-12)
    assert found["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-12)
    with_ends = nats.sum() / math.log(2) / size
    assert found["bits_per_byte_with_ends"] == pytest.approx(with_ends, rel=1e-12)
    assert found["nats_per_end"] == pytest.approx(np.mean([nats[i] for i in ends]), rel=1e-12)

    # the standard error: the sums of each document's, as the delta method has them
    numbers = sorted({row[0] for _, row in text})
    residuals = []
    for number in numbers:
        own = [i for i, row in text if row[0] == number]
        above = sum(nats[i] for i in own) / math.log(2)
        residuals.append(above - bits / size * sum(rows[i][1] for i in own))
    n = len(numbers)
    error = math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / size
    assert found["bits_per_byte_stderr"] == pytest.approx(error, rel=1e-9)

    buckets = by_position(targets, nats)
    assert sum(bucket["tokens"] for bucket in buckets) == len(text)
    for bucket in buckets:
        low, high = bucket["context"]
        own = [i for i, row in text if low <= row[3] <= high]
        assert bucket["tokens"] == len(own) and low & (low - 1) == 0 and high < 2 * low
        assert bucket["bytes"] == sum(rows[i][1] for i in own)
        assert bucket["nats_per_token"] == pytest.approx(np.mean([nats[i] for i in own]))
    assert buckets[-1]["context"][1] == max(row[3] for row in rows) <= seq_len


def test_several_texts_are_one(store):
    """As if the documents stood in one text: nothing is weighted by text."""
    targets = targets_of(store, 16)
    nats = np.random.default_rng(1).gamma(2.0, 1.0, len(targets.sizes))
    cut = int(np.flatnonzero(targets.documents == 2)[0])

    def part(chosen, first):
        documents = targets.documents[chosen] - first
        fields = targets.sizes, targets.ends, targets.contexts
        sizes, ends, contexts = (x[chosen] for x in fields)
        return TextTargets(sizes, ends, contexts, documents), nats[chosen]

    together = joined([part(slice(None, cut), 0), part(slice(cut, None), 2)])
    assert scores(*together) == scores(targets, nats)


def test_a_constant_loss_has_no_error_and_one_document_none(store):
    targets = targets_of(store, 16)
    found = scores(targets, np.full(len(targets.sizes), 1.5))
    assert found["nats_per_token_stderr"] == pytest.approx(0, abs=1e-12)
    one = targets_of(store, 16, 5)
    assert scores(one, np.ones(5))["bits_per_byte_stderr"] is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a=x", "a=y"], "the name a"),
        (["books"], "NAME=PATH"),
        (["=x"], "NAME=PATH"),
        (["a b=x"], "NAME=PATH"),
        (["a="], "NAME=PATH"),
        (["all=x"], "the name all"),
        (["held_out=x"], "the name held_out"),
        (["held_out", "held_out"], "the name held_out"),
        ([], "has no value"),
    ],
)
def test_wrong_names(given, words):
    with pytest.raises(UserError, match=f"--texts.*{words}"):
        parse_texts(given)


def test_names_and_paths():
    assert parse_texts(["a=x/y=z", "held_out"]) == {"a": "x/y=z", "held_out": ""}
