"""The most frequent n-grams against collections.Counter: ties, documents, parts, wide ids."""

import itertools
from collections import Counter

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.data.fgram_counts import most_frequent


def by_counter(tokens, starts, orders, count):
    """[(n-gram, its count)], most frequent first; ties: shorter, then lower ids."""
    counts = Counter()
    for a, b in itertools.pairwise(starts):
        document = [int(t) for t in tokens[a:b]]
        for n in orders:
            counts.update(zip(*(document[k:] for k in range(n)), strict=False))
    return sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:count]


@pytest.mark.parametrize("part", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("vocab", "orders", "count"),
    [(5, (2,), 20), (5, (2, 3), 60), (9, (2, 3, 4), 150), (200_000, (2, 3, 4, 5), 40)],
)
def test_it_equals_a_counter(vocab, orders, count, part):
    """200,000 ids: three tokens fill a word, so longer n-grams take two."""
    rng = np.random.default_rng(vocab)
    ids = np.sort(rng.choice(vocab, min(vocab, 6), replace=False))
    ids[-1] = vocab - 1
    tokens = ids[rng.integers(0, len(ids), 400)].astype(np.uint32)
    starts = np.array([0, 1, 3, 3, 120, 121, 300, 399, 400])
    expected = by_counter(tokens, starts, orders, count)
    assert len(expected) == count
    tied = [c for _, c in by_counter(tokens, starts, orders, count + 1)][-2:]
    assert tied[0] == tied[1]  # the rule for ties decides which is the last
    tables, least = most_frequent(tokens, starts, orders, count, vocab, part)
    assert least == expected[-1][1]
    for n, table in zip(orders, tables, strict=True):
        assert table.dtype == np.int32 and table.shape[1] == n
        assert [tuple(row) for row in table.tolist()] == sorted(
            g for g, _ in expected if len(g) == n
        )


def test_more_rows_than_n_grams_are_refused():
    tokens, starts = np.array([0, 1, 0, 1], np.uint16), np.array([0, 4])
    tables, least = most_frequent(tokens, starts, (2, 3), 4, 2)
    assert [t.tolist() for t in tables] == [[[0, 1], [1, 0]], [[0, 1, 0], [1, 0, 1]]]
    assert least == 1
    with pytest.raises(UserError, match=r"rows_per_head = 5: must be at most 4"):
        most_frequent(tokens, starts, (2, 3), 5, 2)
