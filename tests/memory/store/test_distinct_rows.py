"""Distinct rows against numpy.unique."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from engram_jax.memory.store.distinct_rows import distinct


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("count", [1, 2, 7, 1000, 4095, 4096, 50_000])
@pytest.mark.parametrize("highest", [0, 1, 300, 70_000, 2**31 - 1])
def test_equals_numpy(dtype, count, highest):
    ids = np.random.default_rng(count + highest).integers(0, highest + 1, count).astype(dtype)
    ids[-1] = highest
    unique, inverse = distinct(ids)
    want, positions = np.unique(ids, return_inverse=True)
    assert unique.dtype == dtype and inverse.dtype == np.int32
    np.testing.assert_array_equal(unique, want)
    np.testing.assert_array_equal(inverse, positions)


def test_ids_beyond_32_bits():
    ids = np.array([2**40, 3, 2**40 + 1, 3, 2**40], np.int64)
    unique, inverse = distinct(ids)
    assert list(unique) == [3, 2**40, 2**40 + 1] and list(inverse) == [1, 0, 2, 0, 1]


def test_slices_and_nothing_at_all():
    ids = np.arange(20, dtype=np.int32)[::-3]
    unique, inverse = distinct(ids)
    np.testing.assert_array_equal(unique[inverse], ids)
    unique, inverse = distinct(np.empty(0, np.int32))
    assert unique.size == inverse.size == 0


def test_wrong_ids_are_refused():
    with pytest.raises(IndexError, match="row -4"):
        distinct(np.array([3, -4], np.int32))
    with pytest.raises(ValueError, match="must be int32 or int64"):
        distinct(np.array([3.0]))
    with pytest.raises(ValueError, match="too many for one call"):
        distinct(np.full(5, 2**62, np.int64))


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
@pytest.mark.parametrize("highest", [0, 5, 10_000, 2**31 - 1])
def test_shared_by_the_cores(pieces, highest, monkeypatch):
    module = importlib.import_module("engram_jax.memory.store.distinct_rows")
    monkeypatch.setattr(module, "_SHARED", 10)
    monkeypatch.setattr(module, "cores", lambda: pieces)
    ids = np.minimum(np.random.default_rng(pieces).zipf(1.2, 9_000), highest + 1).astype(np.int64)
    ids = (ids - 1).astype(np.int32)
    unique, inverse = distinct(ids)
    want, positions = np.unique(ids, return_inverse=True)
    np.testing.assert_array_equal(unique, want)
    np.testing.assert_array_equal(inverse, positions)
