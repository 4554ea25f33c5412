"""Counts of n-grams, rows and collisions, against loops over a dictionary."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.analysis import usage as module
from engram_jax.analysis.usage import (
    BANDS,
    NgramCounts,
    band_name,
    count_ngrams,
    hits,
    rank_curve,
    rows_of,
    usage,
    zipf,
)
from tests.tiny import VOCAB, tiny_addressing, tiny_config


@pytest.fixture(scope="module")
def text():
    """(addressing, layer, blocks): documents of a few ids, so that n-grams repeat; padding."""
    addressing = tiny_addressing(tiny_config())
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(3):
        tokens = rng.choice(rng.integers(0, VOCAB, 12), (4, 20)).astype(np.int32)
        segments = np.cumsum(rng.random((4, 20)) < 0.2, axis=1).astype(np.int32) + 1
        segments[-1, -6:] = 0
        blocks.append((tokens, segments))
    return addressing, addressing.layers[1], blocks


def by_hand(addressing, layer, blocks):
    """order -> {n-gram: (how often, its rows)}."""
    found = {order: defaultdict(lambda: [0, None]) for order in layer.orders}
    for tokens, segments in blocks:
        canonical = canonicalise(tokens, addressing.compression)
        rows = addresses(canonical, layer, segments)
        for b, t in np.argwhere(segments > 0):
            ids = []
            for k in range(max(layer.orders)):
                inside = t - k >= 0 and segments[b, t - k] == segments[b, t]
                ids.append(int(canonical[b, t - k]) if inside else layer.fill_id)
            for i, order in enumerate(layer.orders):
                heads = slice(i * layer.heads_per_order, (i + 1) * layer.heads_per_order)
                entry = found[order][tuple(ids[:order][::-1])]
                entry[0] += 1
                assert entry[1] in (None, tuple(rows[b, t, heads].tolist()))
                entry[1] = tuple(rows[b, t, heads].tolist())
    return found


@pytest.mark.parametrize("block", [7, 1 << 17])
def test_counts_equal_brute_force(text, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "_MERGED", block)
    layer = text[1]
    wanted, found = by_hand(*text), count_ngrams(*text)
    for i, order in enumerate(layer.orders):
        counts = found[order]
        ngrams = [tuple(w) for w in counts.windows.tolist()]
        assert ngrams == sorted(wanted[order])
        assert counts.counts.tolist() == [wanted[order][n][0] for n in ngrams]
        assert (counts.of(counts.windows) == counts.counts).all()
        asked = np.concatenate([counts.windows[::-3], counts.windows + 1]).reshape(-1, 1, order)
        known = dict(zip(ngrams, counts.counts.tolist(), strict=True))
        found_of = [known.get(tuple(w), 0) for w in asked.reshape(-1, order).tolist()]
        assert counts.of(asked)[:, 0].tolist() == found_of and 0 in found_of
        rows = rows_of(layer, order, counts.windows)
        assert [tuple(r) for r in rows.tolist()] == [wanted[order][n][1] for n in ngrams]
        made = usage(layer, counts)
        assert made.ngrams == len(ngrams) and made.positions == sum(counts.counts)
        together = Counter(row for _, row in wanted[order].values())
        assert made.inseparable == sum(n for n in together.values() if n > 1)
        for j, head in enumerate(made.heads):
            readers = Counter(row[j] for _, row in wanted[order].values())
            assert head.touched == len(readers)
            assert head.sharing == sum(n for n in readers.values() if n > 1)
            assert head.rows == layer.head_sizes[i * layer.heads_per_order + j]
            assert head.dead == 1 - len(readers) / head.rows
            read = Counter()
            for count, row in wanted[order].values():
                read[row[j]] += count
            reads = [read[head.offset + row] for row in range(head.rows)]
            assert hits(layer, found)[head.offset :][: head.rows].tolist() == reads
            in_band = Counter(max(b for b in BANDS if b <= n) for n in reads)
            assert head.hits == tuple(in_band[b] for b in BANDS)
    assert any(head.sharing for head in usage(layer, found[layer.orders[-1]]).heads)


def test_sharing_of_random_rows_is_what_is_expected():
    """The expectation against 300 draws."""
    rng, rows, count = np.random.default_rng(0), 101, 60
    drawn = rng.integers(0, rows, (300, count))
    shared = [sum(n for n in np.bincount(d, minlength=rows) if n > 1) for d in drawn]
    expected = count * (1 - (1 - 1 / rows) ** (count - 1))
    assert abs(np.mean(shared) - expected) < 3 * np.std(shared) / np.sqrt(300)
    layer = tiny_addressing(tiny_config()).layers[1]
    counts = NgramCounts(2)
    counts.add(rng.integers(0, 40, (500, 2)))
    for head in usage(layer, counts).heads:
        alone = (1 - 1 / head.rows) ** (len(counts.windows) - 1)
        assert head.expected_sharing == len(counts.windows) * (1 - alone)


def test_zipf_of_a_known_law():
    ranks = np.arange(1, 20_001)
    for s in (0.8, 1.0, 1.3):
        assert abs(zipf((1e9 * ranks**-s).astype(np.int64)) - s) < 0.01
    assert np.isnan(zipf(np.ones(9, np.int64)))


def test_ranks_and_names_of_bands():
    ranks, counts = rank_curve(np.array([3, 9, 1, 9]))
    assert (ranks.tolist(), counts.tolist()) == ([1, 2, 3, 4], [9, 9, 3, 1])
    assert len(rank_curve(np.arange(10_000))[0]) <= 50
    assert [len(x) for x in rank_curve(np.zeros(0, np.int64))] == [0, 0]
    names = [band_name(*pair) for pair in ((0, 1), (1, 2), (3, 4), (2, 4), (256, np.inf))]
    assert names == ["never", "once", "3 times", "2 to 3 times", "256 times and more"]


def test_nothing_to_count(text):
    addressing, layer, _ = text
    empty = count_ngrams(addressing, layer, [])
    made = usage(layer, empty[layer.orders[0]])
    assert (made.ngrams, made.positions, made.inseparable) == (0, 0, 0)
    assert all(head.touched == 0 and head.dead == 1 for head in made.heads)
