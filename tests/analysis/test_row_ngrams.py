"""Readers of rows, norms and rows that are alike, against loops over the table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.addressing import build_compression
from engram_jax.analysis import row_ngrams, usage
from engram_jax.analysis.row_ngrams import (
    CanonicalText,
    head_of,
    nearest_rows,
    order_of,
    read_rows,
    readers,
    row_norms,
)
from engram_jax.analysis.usage import NgramCounts, rows_of
from tests.tiny import tiny
from tests.tokenizer_kinds import kind


@pytest.fixture(scope="module")
def given():
    """(program, tables, layer, counts by order); some rows are zero."""
    program, state = tiny()
    layer = program.addressing.layers[1]
    rows = np.array(state.memory["1"].rows)
    rows[layer.offsets[1] : layer.offsets[1] + 3] = 0
    memory = {"1": dataclasses.replace(state.memory["1"], rows=rows)}
    rng, counts = np.random.default_rng(0), {}
    for order in layer.orders:
        counts[order] = NgramCounts(order)
        for _ in range(3):
            counts[order].add(rng.integers(0, 9, (80, order)))
    return program, memory, layer, counts


@pytest.mark.parametrize("block", [11, 1 << 17])
def test_readers_equal_brute_force(given, block, monkeypatch):
    monkeypatch.setattr(usage, "BLOCK", block)
    _, _, layer, counts = given
    for i, order in enumerate(layer.orders):
        first = i * layer.heads_per_order
        wanted = range(layer.offsets[first], layer.offsets[first] + layer.head_sizes[first])
        other = layer.offsets[first + 1] + 5  # of another head
        found = readers(layer, counts[order], [*wanted, other], most=3)
        addresses = rows_of(layer, order, counts[order].windows)
        for row in [*wanted, other]:
            mine = np.flatnonzero((addresses == row).any(axis=1))
            pairs = [(-counts[order].counts[n], tuple(counts[order].windows[n])) for n in mine]
            assert found[row].total == len(mine)
            assert found[row].hits == counts[order].counts[mine].sum()
            shown = zip(-found[row].counts, map(tuple, found[row].windows), strict=True)
            assert list(shown) == sorted(pairs)[:3]
            assert head_of(layer, row) == first + (row == other) and order_of(layer, row) == order
        assert max(found[row].total for row in wanted) > 3


@pytest.mark.parametrize("block", [5, 1 << 14])
def test_rows_norms_and_neighbours(given, block, monkeypatch):
    monkeypatch.setattr(row_ngrams, "ROWS", block)
    program, memory, layer, _ = given
    table = np.asarray(memory["1"].rows, np.float64)
    asked = np.array([3, 0, 77, 3])
    np.testing.assert_array_equal(read_rows(program, memory, 1, asked), table[asked].astype("f4"))
    norms = np.sqrt((table**2).sum(axis=1))[: layer.rows]
    np.testing.assert_allclose(row_norms(program, memory, 1), norms, rtol=1e-5)
    for row in (0, layer.offsets[1] + 7, layer.rows - 1):
        head = head_of(layer, row)
        low, high = layer.offsets[head], layer.offsets[head] + layer.head_sizes[head]
        cosines = {
            other: table[row] @ table[other] / (norms[row] * norms[other])
            for other in range(low, high)
            if other != row and norms[other] > 0
        }
        best = sorted(cosines, key=lambda other: -cosines[other])
        rows, found = nearest_rows(program, memory, 1, row, most=4)
        assert rows.tolist() == best[:4]
        np.testing.assert_allclose(found, [cosines[other] for other in best[:4]], atol=1e-5)
        assert len(nearest_rows(program, memory, 1, row, most=999)[0]) == len(cosines)
    zero = layer.offsets[1]
    assert len(nearest_rows(program, memory, 1, zero)[0]) == 0


def test_canonical_ids_as_text(given):
    tokenizer = kind("byte-level BPE")
    compression = build_compression(tokenizer)
    addressing = dataclasses.replace(given[0].addressing, compression=compression)
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
