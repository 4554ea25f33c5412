"""Passages, their retrieval and the layout against plain Python on small texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.data.packing import PackedSequences
from engram_jax.evaluation.rag import (
    PassageIndex,
    Settings,
    batches,
    chunks,
    layout,
    passages,
)
from tests.evaluation.test_target_losses import store_of, targets

T = 20
PASSAGES = [
    "def read(path): return open(path).read()",
    "The path of a file, read by a reader.",
    "class Reader: pass",
    "numbers 1 2 3 and no other word",
    "",
    "read read read",
    "ein Weg führt zur Datei_7",
]


def bm25(query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25 of every passage, term by term (Kamphuis et al., 2020, table 1)."""
    texts = [re.findall(r"\w+", text.lower()) for text in PASSAGES]
    mean = sum(map(len, texts)) / len(texts)
    scores = [0.0] * len(texts)
    for term in re.findall(r"\w+", query.lower()):
        n = sum(term in text for text in texts)
        idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        for i, text in enumerate(texts):
            tf = Counter(text)[term]
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
    return scores


@pytest.mark.parametrize(
    "query", ["read the path", "READER", "a file of numbers 2 2", "datei_7", "open class", "führt"]
)
def test_the_best_passage_by_brute_force(query):
    scores = bm25(query)
    best = PassageIndex(PASSAGES).best(query)
    assert best is not None
    assert scores[best] == pytest.approx(max(scores), rel=1e-6) and max(scores) > 0


@pytest.mark.parametrize("query", ["", "...", "unknown words"])
def test_a_query_without_a_known_word_finds_nothing(query):
    assert PassageIndex(PASSAGES).best(query) is None


def test_the_index_s_bytes():
    """A float32 score and an int32 passage for each different term of a passage, and offsets."""
    terms = [set(re.findall(r"\w+", text.lower())) for text in PASSAGES]
    entries, vocabulary = sum(map(len, terms)), len(set().union(*terms))
    found = PassageIndex(PASSAGES).bytes
    assert 8 * entries + 4 * vocabulary <= found <= 8 * entries + 8 * (vocabulary + 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("rag") / "a", 0, 12)


@pytest.mark.parametrize("size", [1, 6, 7, T])
def test_passages_cover_the_sequences_and_cross_nothing(store, size):
    sequences = PackedSequences(store, T, 0)
    numbers = np.asarray([0, 2, 5])
    expected = []
    for number in numbers:
        cuts = sorted(
            {number * T, (number + 1) * T}
            | {int(s) for s in store.starts if number * T < s < (number + 1) * T}
        )
        for start, end in pairwise(cuts):
            at = start
            while at + size < end:
                expected.append((at, at + size))
                at += size
            expected.append((max(start, end - size), end))
    found = passages(sequences, numbers, size)
    assert [x.tolist() for x in found] == [store.tokens[a:b].tolist() for a, b in expected]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunks_hold_every_target_once_in_order(store, size):
    found = chunks(store, size)
    assert all(0 < x.end - x.start <= size for x in found)
    held = [at for x in found for at in range(x.start, x.end)]
    assert held == list(range(len(store)))
    assert sum(x.targets for x in found) == len(targets(store))


@pytest.mark.parametrize("passage", [0, 8])
def test_every_target_is_predicted_after_its_own_text(store, passage):
    """The tokens before every target, read back from the batch."""
    chunk, context = 5, T - passage - 5 + 1
    pieces = chunks(store, chunk)
    before = [np.full(passage if i % 3 else 0, 60, np.int32) for i in range(len(pieces))]
    wanted = iter(targets(store))
    rows = 0
    for batch in batches(store, pieces, before, context, (4, T), 3):
        assert {x.shape for x in batch.values()} == {(4, T)}
        for row in range(4):
            real = int(batch["segments"][row].sum())
            assert batch["segments"][row, :real].all()
            assert (batch["tokens"][row, real:] == 3).all()
            np.testing.assert_array_equal(batch["positions"][row, :real], range(real))
            if rows == len(pieces):
                assert not batch["loss_mask"][row].any() and not real
                continue
            piece, given = pieces[rows], before[rows]
            rows += 1
            for t in np.flatnonzero(batch["loss_mask"][row]):
                document, at = next(wanted)
                start = max(int(store.starts[document]), piece.start - context)
                assert batch["targets"][row, t] == store.tokens[at]
                expected = [*given.tolist(), *store.tokens[start:at].tolist()]
                assert batch["tokens"][row, : t + 1].tolist() == expected
            assert not batch["targets"][row][batch["loss_mask"][row] == 0].any()
    assert next(wanted, None) is None


def test_what_fits_in_the_trained_length():
    assert layout(Settings("all"), 128) == (32, 64, 33)
    assert layout(Settings("all", 28, 100), 128) == (28, 100, 1)
    assert layout(Settings("all"), 3) == (1, 1, 2)
    with pytest.raises(UserError, match=r"--rag_chunk=29 and --rag_passage=100: .* = 128"):
        layout(Settings("all", 29, 100), 128)
