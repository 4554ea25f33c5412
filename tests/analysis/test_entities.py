"""Entities by the rule and as labelled, and the tokens in which they end, against decoding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.analysis.entities import (
    entities,
    final_tokens,
    final_tokens_of_batch,
    labelled_tokens,
    text_and_ends,
)
from engram_jax.config.errors import UserError
from engram_jax.data.packing import PackedSequences
from tests.tokenizer_kinds import KINDS, kind

BY_THE_RULE = [
    ("The United Nations met in New York.", ["United Nations", "New York"]),
    ("She saw Paris. London was near.", ["Paris"]),
    ("She saw Paris! (London was near.)", ["Paris"]),
    ('He said "Paris is far", and "Rome."  Then Oslo fell.', ["Paris", "Rome", "Oslo"]),
    ("in London\nParis and\n  Rome", ["London"]),
    ("of London's Big Ben", ["London", "Big Ben"]),
    ("by O'Brien, Jean-Paul Sartre", ["O'Brien", "Jean-Paul Sartre"]),
    ("what I, A and NASA did", ["NASA"]),
    ("New York", ["York"]),
    ("in New  York (see Élan)", ["New", "York", "Élan"]),
    ("self.Foo(Bar) = Base64", ["Bar", "Base64"]),
    ("a Mr. Smith", ["Mr"]),
    (" " * 80 + "Paris", []),
    ("x" + " " * 80 + "Paris", []),
    ("", []),
    ("none here", []),
]


@pytest.mark.parametrize(("text", "wanted"), BY_THE_RULE)
def test_the_rule(text, wanted):
    assert [text[a:b] for a, b in entities(text)] == wanted


@pytest.mark.parametrize("name", [n for n in KINDS if "byte" in n and "BPE" in n] + ["WordPiece"])
def test_an_entity_ends_in_the_token_that_completes_it(name):
    tokenizer = kind(name)
    text = "the Memory reads New Ünïcode 日本 and the Network, too"
    if name == "WordPiece":
        text = "do the memory"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole, ends = text_and_ends(tokenizer, ids)
    assert whole == tokenizer.decode(ids, skip_special_tokens=False)
    spans = entities(whole)
    assert len(spans) == (0 if name == "WordPiece" else 3)
    wanted = []
    for _, end in spans:
        decoded = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
        wanted.append(next(i for i, d in enumerate(decoded) if d.startswith(whole[:end])))
    assert final_tokens(tokenizer, ids).tolist() == wanted
    assert ends[-1] == len(whole) and (np.diff(ends) >= 0).all()


def test_of_documents_in_a_packed_batch():
    """A document's part is read by itself: the first word of each begins a sentence."""
    tokenizer = kind("byte-level BPE")
    texts = ["Paris and Rome", "in Oslo", "", "Bergen to Oslo and"]
    ids = [encode_batch(tokenizer, [text])[0].ids for text in texts]
    flat = np.concatenate(ids).astype(np.int32)
    segments = np.concatenate([np.full(len(x), i + 1) for i, x in enumerate(ids)])
    batch = {
        "tokens": np.stack([np.append(flat, [0, 0]), np.zeros(len(flat) + 2, int)]),
        "segments": np.stack([np.append(segments, [0, 0]), np.zeros(len(flat) + 2, int)]),
    }
    starts = np.cumsum([0, *map(len, ids)])
    wanted = [starts[i] + p for i, x in enumerate(ids) for p in final_tokens(tokenizer, x)]
    found, padding = final_tokens_of_batch(tokenizer, batch)
    assert found.tolist() == wanted and len(wanted) == 3 and padding.tolist() == []


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_a_labelled_file(tmp_path):
    """Spans of characters, not bytes; the token of the last character, of several the last."""
    tokenizer = kind("byte-level BPE")
    texts = ["naïve 日本 memory", "memory reads New Memory"]
    spans = [[[6, 8], [0, 5]], [[13, 23]]]
    records = [{"text": t, "entities": s} for t, s in zip(texts, spans, strict=True)]
    path = write(
        tmp_path / "labels.jsonl", records[0], "", records[1], {"text": "", "entities": []}
    )
    store, found = labelled_tokens(tokenizer, 1, 400, path)
    assert store.documents == 3 and (store.tokens[store.starts[1:] - 1] == 1).all()
    wanted = []
    for start, text, of_text in zip(store.starts, texts, spans, strict=False):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
        for _, end in of_text:
            wanted.append(start + next(i for i, d in enumerate(decoded) if d[:end] == text[:end]))
    assert found.tolist() == sorted(wanted)
    # As sequences of 5 tokens, each place is in the sequence that has the token.
    sequences = PackedSequences(store, 5, 0, pad_tail=True)
    tokens = sequences.batch(np.arange(len(sequences)))["tokens"]
    assert (tokens.reshape(-1)[found] == store.tokens[found]).all()


BAD = [
    ("{", "line 2: is no JSON"),
    ("[1]", "line 2: is [1]; must be"),
    ('{"text": "a"}', 'must be {"text": "...", "entities": [[start, end], ...]}'),
    ('{"text": "abc", "entities": [[0, 4]]}', "entity [0, 4]: must be [start, end]"),
    ('{"text": "abc", "entities": [[2, 2]]}', "0 <= start < end <= 3"),
    ('{"text": "abc", "entities": [[true, 2]]}', "entity [True, 2]"),
    ('{"text": "abc", "entities": [3]}', "entity 3"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_a_line_that_is_none(tmp_path, line, words):
    path = write(tmp_path / "labels.jsonl", {"text": "ab", "entities": [[0, 1]]}, line)
    with pytest.raises(UserError) as error:
        labelled_tokens(kind("byte-level BPE"), 1, 400, path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_entities(tmp_path):
    path = write(tmp_path / "labels.jsonl", {"text": "ab", "entities": []})
    with pytest.raises(UserError, match="labels no entity"):
        labelled_tokens(kind("byte-level BPE"), 1, 400, path)
