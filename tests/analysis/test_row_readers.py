"""Blocks of documents, and rows of other heads. The readers themselves: tests/explore."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engram_jax.analysis import row_readers
from engram_jax.analysis.row_readers import RowReaders, text_blocks
from engram_jax.analysis.usage import count_ngrams
from tests.tiny import VOCAB, tiny_addressing, tiny_config


@pytest.fixture(scope="module")
def text():
    """(tokens [N], starts): documents of 1 to 9 tokens."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10, 30)
    return rng.integers(0, VOCAB, sizes.sum()).astype(np.uint16), np.append(0, sizes.cumsum())


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
@pytest.mark.parametrize("most", [1, 23, 10_000])
def test_blocks_are_the_first_documents(text, block, most, monkeypatch):
    monkeypatch.setattr(row_readers, "TEXT_BLOCK", block)
    tokens, starts = text
    blocks = list(text_blocks(tokens, starts, most))
    assert all(t.shape == s.shape == (1, t.size) and t.dtype == np.int32 for t, s in blocks)
    found = np.concatenate([t[0] for t, _ in blocks])
    np.testing.assert_array_equal(found, tokens[:most])
    cut = []
    for t, s in blocks:
        assert s.min() == 1  # 0 would be padding
        cut += [t[0][s[0] == n].tolist() for n in np.unique(s)]
    end = min(most, len(tokens))
    wanted = [tokens[a : min(b, end)].tolist() for a, b in itertools.pairwise(starts)]
    assert cut == [w for w in wanted if w]


def test_a_row_belongs_to_one_head(text):
    addressing = tiny_addressing(tiny_config())
    layer = addressing.layers[1]
    readers = RowReaders(layer, count_ngrams(addressing, layer, text_blocks(*text, 100)))
    found = [readers.of(head, layer.offsets[head] + 3, 2) for head in range(layer.heads)]
    assert all(len(f.windows) == min(f.total, 2) for f in found)
    for head, row in ((0, layer.offsets[1]), (1, layer.offsets[1] - 1), (3, layer.rows)):
        with pytest.raises(ValueError, match=f"row {row} is none of head {head}"):
            readers.of(head, row, 2)


def test_a_text_without_ngrams():
    addressing = tiny_addressing(tiny_config())
    layer = addressing.layers[1]
    readers = RowReaders(layer, count_ngrams(addressing, layer, []))
    assert readers.of(0, 0, 2).reads == readers.of(0, 0, 2).total == 0
