"""Who reads a row, against loops over the n-grams; canonical ids as text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.addressing import build_compression
from engram_jax.analysis import usage
from engram_jax.analysis.row_readers import CanonicalText, RowReaders, head_of, order_of
from engram_jax.analysis.usage import NgramCounts, count_ngrams, rows_of
from tests.tiny import tiny_addressing, tiny_config
from tests.tokenizer_kinds import kind


@pytest.fixture(scope="module")
def addressing():
    return tiny_addressing(tiny_config())


@pytest.fixture(scope="module")
def counts(addressing):
    """By order."""
    rng, found = np.random.default_rng(0), {}
    for order in addressing.layers[1].orders:
        found[order] = NgramCounts(order)
        for _ in range(3):
            found[order].add(rng.integers(0, 9, (80, order)))
    return found


@pytest.mark.parametrize("block", [11, 1 << 17])
def test_readers_equal_brute_force(addressing, counts, block, monkeypatch):
    monkeypatch.setattr(usage, "BLOCK", block)
    layer = addressing.layers[1]
    readers, most = RowReaders(layer, counts), 0
    for head, (offset, size) in enumerate(zip(layer.offsets, layer.head_sizes, strict=True)):
        order = layer.orders[head // layer.heads_per_order]
        rows = rows_of(layer, order, counts[order].windows)[:, head % layer.heads_per_order]
        for row in range(offset, offset + size):
            found, mine = readers.of(row, 3), np.flatnonzero(rows == row)
            pairs = [(-counts[order].counts[n], tuple(counts[order].windows[n])) for n in mine]
            assert found.total == len(mine)
            assert found.reads == counts[order].counts[mine].sum()
            shown = zip(-found.counts, map(tuple, found.windows), strict=True)
            assert list(shown) == sorted(pairs)[:3]
            assert (head_of(layer, row), order_of(layer, row)) == (head, order)
            most = max(most, found.total)
    assert most > 3


def test_some_heads_alone(addressing, counts):
    layer = addressing.layers[1]
    every, some = RowReaders(layer, counts), RowReaders(layer, counts, heads=[1, 3])
    for head in (1, 3):
        row = layer.offsets[head] + 5
        a, b = every.of(row, 9), some.of(row, 9)
        assert (a.reads, a.total, a.windows.tolist()) == (b.reads, b.total, b.windows.tolist())
    for readers, row in ((some, layer.offsets[1] - 1), (every, -1), (every, layer.rows)):
        with pytest.raises(ValueError, match=f"row {row} is none"):
            readers.of(row, 2)


def test_a_text_without_ngrams(addressing):
    layer = addressing.layers[1]
    readers = RowReaders(layer, count_ngrams(addressing, layer, []))
    assert readers.of(0, 2).reads == readers.of(0, 2).total == 0


def test_canonical_ids_as_text(addressing):
    tokenizer = kind("byte-level BPE")
    compression = build_compression(tokenizer)
    addressing = dataclasses.replace(addressing, compression=compression)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    fill = int(compression[0])
    text = CanonicalText(addressing, tokenizer, fill)
    small, large = (compression[encode(t)] for t in (" the memory", " THE"))
    assert text(small) == "the·memory"
    assert "".join(text(large).split("·")).replace("␣", "") == "the"
    assert text([fill, fill, *compression[encode(" ")]]) == "⊢·⊢·␣"
    assert text([*compression[encode("a")], fill]).startswith("a·")
    raw = CanonicalText(dataclasses.replace(addressing, compression=None), tokenizer, -1)
    assert raw(encode(" the memory")) == " the· memory"
