"""The held-out split is by content: stable, about the wanted share, never empty."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.data.split import hold_out


def digests(count: int, start: int = 0) -> np.ndarray:
    raw = b"".join(hashlib.sha256(b"%d" % i).digest()[:16] for i in range(start, start + count))
    return np.frombuffer(raw, np.uint8).reshape(-1, 16)


def test_share_and_oracle():
    codes = digests(20_000)
    held = hold_out(codes, np.ones(20_000, np.int64), 0.1)
    oracle = [int.from_bytes(code[:8].tobytes(), "big") < 0.1 * 2**64 for code in codes]
    assert held.tolist() == oracle
    assert abs(held.mean() - 0.1) < 0.01


def test_adding_or_reordering_documents_moves_none():
    codes, sizes = digests(500), np.ones(500, np.int64)
    held = hold_out(codes, sizes, 0.3)
    assert np.array_equal(hold_out(codes[:300], sizes[:300], 0.3), held[:300])
    order = np.random.default_rng(0).permutation(500)
    assert np.array_equal(hold_out(codes[order], sizes, 0.3), held[order])


def test_pieces_of_a_document_stay_together():
    origins = np.repeat(np.arange(100), 5)
    held = hold_out(digests(500), np.ones(500, np.int64), 0.4, origins)
    assert 0 < held.sum() < 500
    for origin in range(100):
        assert len(set(held[origins == origin])) == 1


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(fraction):
    sizes = np.asarray([1000, 10, 500])
    held = hold_out(digests(3), sizes, fraction)
    assert held.tolist() == ([False, True, False] if fraction < 0.5 else [True, False, False])


def test_one_document_cannot_be_split():
    with pytest.raises(UserError, match="too little"):
        hold_out(digests(1), np.asarray([5]), 0.5)
    with pytest.raises(UserError, match="1 usable document"):
        hold_out(digests(3), np.asarray([5, 5, 5]), 0.5, np.zeros(3, int))
