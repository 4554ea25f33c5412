"""Counts against numpy.bincount, and the file they are kept in."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store.read_counts import (
    AccessCounter,
    Frequency,
    count_accesses,
    load_frequency,
    save_frequency,
)

ROWS = {"1": 300, "14": 50}


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {layer: rng.integers(0, n - 5, (2, 30, 4)).astype(np.int32) for layer, n in ROWS.items()}
        for _ in range(7)
    ]


def test_counts_are_those_of_numpy(batches):
    got = count_accesses(iter(batches), ROWS)
    for layer, rows in ROWS.items():
        want = np.bincount(np.concatenate([b[layer].ravel() for b in batches]), minlength=rows)
        order = sorted(np.flatnonzero(want), key=lambda row: (-want[row], row))
        assert got[layer].ids.dtype == np.int32 and got[layer].counts.dtype == np.int64
        assert list(got[layer].ids) == order and list(got[layer].counts) == list(want[order])
        assert (got[layer].rows, got[layer].lookups) == (rows, 7 * 240)
    few = count_accesses(batches, ROWS, keep=3)["14"]
    np.testing.assert_array_equal(few.ids, got["14"].ids[:3])
    assert few.lookups == 7 * 240


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_row_outside_counts_nothing(wrong):
    counter = AccessCounter(10)
    with pytest.raises(IndexError, match=f"row {wrong}: must be in 0 to 9"):
        counter.add(np.array([3, wrong]))
    counter.add(np.empty((0, 4), np.int32))
    assert counter.lookups == 0 and counter.frequency().ids.size == 0


def test_the_file_returns_what_was_saved(batches, tmp_path):
    path, layers = tmp_path / "frequency.npz", count_accesses(batches, ROWS)
    save_frequency(path, layers, "cafe", 420)
    assert os.listdir(tmp_path) == ["frequency.npz"]
    found = load_frequency(path, "cafe")
    assert (found.fingerprint, found.tokens, list(found.layers)) == ("cafe", 420, ["1", "14"])
    for layer, want in layers.items():
        got = found.layers[layer]
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.counts, want.counts)
        assert (got.rows, got.lookups) == (want.rows, want.lookups)


def test_another_addressing_is_refused(batches, tmp_path):
    save_frequency(tmp_path / "f", count_accesses(batches, ROWS), "cafe", 1)
    with pytest.raises(UserError, match="counted with addressing cafe, this model has beef"):
        load_frequency(tmp_path / "f", "beef")


def test_damaged_and_foreign_files_are_refused(batches, tmp_path):
    path = tmp_path / "f"
    with pytest.raises(UserError, match="frequency file"):
        load_frequency(path)
    save_frequency(path, count_accesses(batches, ROWS), "cafe", 1)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="frequency file") as caught:
            load_frequency(path)
        assert "\n" not in str(caught.value)
    at = whole.index(b"NUMPY", whole.index(b"14.ids")) + 140  # in the numbers: zip has a checksum
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="frequency file"):
        load_frequency(path)


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([1, 2], [3], "ids must be int32"),
        ([1, 50], [3, 2], "each in 0 to 49"),
        ([-1, 5], [3, 2], "each in 0 to 49"),
        ([1, 2], [2, 3], "distinct rows by falling count"),
        ([2, 2], [3, 2], "distinct rows by falling count"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, ids, counts, message):
    wrong = Frequency(np.array(ids, np.int32), np.array(counts, np.int64), 50, 9)
    save_frequency(tmp_path / "f", {"1": wrong}, "f", 1)
    with pytest.raises(UserError, match=message):
        load_frequency(tmp_path / "f")


def test_a_failed_save_leaves_the_old_file(batches, tmp_path):
    path, layers = tmp_path / "f", count_accesses(batches, ROWS)
    save_frequency(path, layers, "cafe", 1)
    before = path.read_bytes()
    broken = Frequency(layers["1"].ids, layers["1"].counts, "many", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="invalid literal"):
        save_frequency(path, {"1": broken}, "cafe", 1)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["f"]
    with pytest.raises(UserError, match="cannot be written"):
        save_frequency(tmp_path / "no" / "f", layers, "cafe", 1)
