"""Seen n-grams against a set of Python tuples."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.evaluation.seen_ngrams import seen

START = "start"


def text(rng: np.random.Generator, rows: int, length: int, vocab: int) -> tuple[np.ndarray, ...]:
    """Tokens, and positions that start again at random places and in every row."""
    first = rng.random((rows, length)) < 0.15
    first[:, 0] = True
    at = np.arange(length)
    positions = at - np.maximum.accumulate(np.where(first, at, 0), axis=1)
    return rng.integers(0, vocab, (rows, length)).astype(np.uint16), positions.astype(np.int32)


def ngram(tokens: np.ndarray, positions: np.ndarray, row: int, t: int, n: int) -> tuple:
    """The n tokens that end at t; START before the document's."""
    return tuple(
        int(tokens[row, t - k]) if k <= positions[row, t] else START for k in range(n - 1, -1, -1)
    )


@pytest.mark.parametrize("vocab", [3, 30, 60_000])
@pytest.mark.parametrize("orders", [(1,), (2, 3, 4), (5, 2)])
def test_against_a_set(vocab, orders):
    rng = np.random.default_rng(vocab)
    wanted = text(rng, 6, 50, vocab)
    searched = [text(rng, rows, 50, vocab) for rows in (1, 9)]
    if vocab == 60_000:  # nearly nothing would be common
        searched[1][0][:4], searched[1][1][:4] = wanted[0][:4], wanted[1][:4]
        searched[1][0][:4, ::7] += 1
    found = seen(*wanted, searched, orders, vocab)
    assert found.shape == (6, 50, len(orders)) and found.dtype == bool
    for k, n in enumerate(orders):
        known = {
            ngram(tokens, positions, row, t, n)
            for tokens, positions in searched
            for row, t in np.ndindex(tokens.shape)
        }
        expected = [ngram(*wanted, row, t, n) in known for row, t in np.ndindex(6, 50)]
        np.testing.assert_array_equal(found[..., k].ravel(), expected)
        assert vocab == 3 or n == 1 or 0 < np.mean(expected) < 1


def test_many_orders_of_a_large_vocabulary_do_not_overflow():
    """Nine ids below 2**17 are 153 bits."""
    tokens = np.full((1, 9), 2**17 - 1)
    tokens[0, 0] = 5
    positions = np.arange(9)[None]
    other = tokens.copy()
    other[0, 0] = 6
    assert seen(tokens, positions, [(tokens, positions)], (9,), 2**17).all()
    found = seen(tokens, positions, [(other, positions)], (8, 9), 2**17)[0]
    np.testing.assert_array_equal(found[-1], [True, False])


def test_nothing_wanted_or_nothing_searched():
    rng = np.random.default_rng(0)
    tokens, positions = text(rng, 2, 5, 3)
    assert not seen(tokens, positions, [], (2, 3), 3).any()
    assert seen(tokens, positions, [(tokens, positions)], (), 3).shape == (2, 5, 0)
    empty = np.zeros((0, 5), int)
    assert seen(empty, empty, [(tokens, positions)], (2,), 3).shape == (0, 5, 1)
