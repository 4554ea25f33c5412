"""A cache returns the table's bits whatever it holds; what it holds is at most what it may."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store import gather_rows
from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.read_counts import Frequency
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.s3fifo import Sets
from tests.memory.store.tables import FORMATS, numbers, stored

ROWS = 500


class Watched(HostTable):
    """Remembers what it is asked for; may fail."""

    fails = False

    def gather(self, ids, out):
        if self.fails:
            raise UserError("the disk is gone")
        self.asked = [*getattr(self, "asked", []), ids.copy()]
        super().gather(ids, out)


def watched(row_format: RowFormat, rows: int = ROWS) -> Watched:
    return Watched.from_rows(row_format, numbers(row_format, rows))


def frequencies(ids, rows: int = ROWS) -> Frequency:
    ids = np.asarray(ids, np.int32)
    return Frequency(ids, np.arange(len(ids), 0, -1, dtype=np.int64), rows, 10**6)


def read(source, ids) -> list[np.ndarray]:
    ids = np.asarray(ids)
    out = source.format.empty(ids.size)
    for buffer in out:
        buffer[:] = 123
    source.gather(ids, out)
    return list(out)


def check(source, ids) -> None:
    want = stored(source.format, numbers(source.format, source.rows))
    for got, part in zip(read(source, ids), want, strict=True):
        np.testing.assert_array_equal(got, part[ids])


@pytest.mark.parametrize("policy", ["adaptive", "static"])
@pytest.mark.parametrize("capacity", [1, 2, 15, 16, 17, 100, 499, 500, 10_000])
@pytest.mark.parametrize("row_format", [FORMATS[1], FORMATS[3]], ids=str)
def test_any_state_of_the_cache_gives_the_same_bits(row_format, capacity, policy):
    cache = CachedTable(watched(row_format), capacity, policy)
    assert (cache.rows, cache.format) == (ROWS, row_format)
    rng = np.random.default_rng(capacity)
    for step in range(60):
        ids = np.minimum(rng.zipf(1.3, rng.integers(0, 80)) - 1, ROWS - 1)
        check(cache, ids.astype(np.int32 if step % 2 else np.int64))
        if step == 20:
            cache.warm(frequencies(rng.permutation(ROWS)))
    assert cache.capacity <= max(capacity, ROWS + 15)
    if capacity < ROWS:
        assert cache.capacity <= capacity


@pytest.mark.parametrize("capacity", [500, 501, 10_000])
def test_a_cache_of_all_rows_reads_each_once(capacity):
    source = watched(FORMATS[0])
    cache = CachedTable(source, capacity)
    for seed in range(4):
        check(cache, np.random.default_rng(seed).permutation(ROWS))
    assert sum(len(ids) for ids in source.asked) == ROWS
    check(cache, np.arange(ROWS))
    got = cache.counters.snapshot()
    assert (got.lookups, got.hits) == (5 * ROWS, 4 * ROWS)


def test_duplicates_are_read_once_and_in_order():
    source = watched(FORMATS[0])
    check(CachedTable(source, 20), np.array([9, 3, 9, 3, 3, 400, 9]))
    assert [list(ids) for ids in source.asked] == [[3, 9, 400]]


def test_what_is_used_often_stays_through_a_scan():
    source = watched(FORMATS[0], 5_000)
    cache = CachedTable(source, 160)
    often = np.arange(100) * 49  # 10 to each set of 16
    for _ in range(5):
        check(cache, often)
    check(cache, np.arange(1, 5_000, 7))
    source.asked = []
    check(cache, often)
    assert sum(len(ids) for ids in source.asked) == 0


def test_the_cache_follows_when_the_favourites_change():
    source = watched(FORMATS[0], 5_000)
    cache = CachedTable(source, 160)
    old, new = np.arange(100) * 49, np.arange(100) * 49 + 3
    for _ in range(200):
        read(cache, old)
    for _ in range(300):
        read(cache, new)
    source.asked = []
    check(cache, new)
    assert sum(len(ids) for ids in source.asked) == 0


def test_warm_rows_are_hits_and_static_means_no_others():
    source = watched(FORMATS[3])
    cache = CachedTable(source, 64, "static")
    favourites = np.r_[np.arange(60), [477]]  # 15 or 16 to each set
    assert cache.warm(frequencies(favourites)) == 61
    source.asked = []
    check(cache, favourites)
    assert source.asked == []
    for _ in range(3):
        check(cache, np.array([61, 99]))
    assert [list(ids) for ids in source.asked] == [[61, 99]] * 3
    assert cache.counters.snapshot().hits == 61


def test_warming_takes_the_most_frequent_as_far_as_they_fit():
    source = watched(FORMATS[0])
    cache = CachedTable(source, 32, "static")  # 2 sets: even rows and odd rows
    order = np.random.default_rng(3).permutation(ROWS)
    assert cache.warm(frequencies(order)) == 32
    want = {*order[order % 2 == 0][:16].tolist(), *order[order % 2 == 1][:16].tolist()}
    source.asked = []
    check(cache, order)
    assert set(order) - set(source.asked[0].tolist()) == want


def test_a_failing_source_leaves_the_cache_usable():
    source = watched(FORMATS[0])
    cache = CachedTable(source, 100)
    check(cache, np.arange(50))
    source.fails = True
    check(cache, np.arange(50))
    with pytest.raises(UserError, match="the disk is gone"):
        read(cache, [3, 200])
    with pytest.raises(UserError, match="the disk is gone"):
        cache.warm(frequencies([400]))
    source.fails = False
    check(cache, np.arange(ROWS))


def test_a_damaged_block_is_never_kept(tmp_path):
    form, path = FORMATS[3], tmp_path / "memory"
    write_memory(path, {"1": (form, ROWS, [numbers(form, ROWS)])}, "f")
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 256 * 20] ^= 1
    path.write_bytes(data)
    cache = CachedTable(open_memory(path).disk("1"), 100)
    for _ in range(2):
        with pytest.raises(UserError, match=r"block 1 .*damaged"):
            read(cache, [2, 20])
    check(cache, [2, 40])


def test_rows_that_were_read_outlive_their_file(tmp_path):
    """What the cache has was verified; what it has not, it does not take from another file."""
    form, path, other = FORMATS[3], tmp_path / "memory", tmp_path / "other"
    write_memory(path, {"1": (form, ROWS, [numbers(form, ROWS)])}, "f")
    write_memory(other, {"1": (form, ROWS, [numbers(form, ROWS, 9)])}, "f")
    cache = CachedTable(open_memory(path).disk("1"), ROWS)
    check(cache, [2, 40])
    path.write_bytes(other.read_bytes())
    for _ in range(2):
        check(cache, [40, 2, 40])
        with pytest.raises(UserError, match="was changed while the file was open"):
            read(cache, [2, 20])
    os.truncate(path, 0)
    check(cache, [40, 2, 40])


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_rows_outside_are_refused(wrong):
    source = watched(FORMATS[0])
    with pytest.raises(IndexError, match=f"row {wrong}"):
        read(CachedTable(source, 10), [0, wrong])
    assert not hasattr(source, "asked")


def test_wrong_settings_are_refused():
    source = watched(FORMATS[0])
    with pytest.raises(UserError, match="capacity 0: must be at least 1 row"):
        CachedTable(source, 0)
    with pytest.raises(UserError, match="policy 'lru': must be one of adaptive, static"):
        CachedTable(source, 9, "lru")
    with pytest.raises(UserError, match="a table of 499 rows: this one has 500"):
        CachedTable(source, 9).warm(frequencies([1], 499))


@pytest.mark.parametrize("capacity", [1, 60, ROWS])
def test_threads_hammering_one_cache(capacity, tmp_path, monkeypatch):
    monkeypatch.setattr(gather_rows, "INLINE_BYTES", 1 << 11)
    form, path = FORMATS[3], tmp_path / "memory"
    write_memory(path, {"1": (form, ROWS, [numbers(form, ROWS)])}, "f")
    cache = CachedTable(open_memory(path).disk("1"), capacity)
    parts = stored(form, numbers(form, ROWS))
    failures = []

    def hammer(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for step in range(60):
                ids = np.minimum(rng.zipf(1.2, rng.integers(1, 120)) - 1, ROWS - 1)
                out = form.empty(ids.size)
                cache.gather(ids, out)
                assert all((o == p[ids]).all() for o, p in zip(out, parts, strict=True))
                if seed == 0 and step % 20 == 0:
                    cache.warm(frequencies(rng.permutation(ROWS)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.counters.snapshot().calls == 360


def test_the_books_hold_no_row_twice_and_none_elsewhere():
    book = Sets.empty(64, 10_000)
    rng = np.random.default_rng(5)
    where = {}  # slot -> row, from the answers alone
    for _ in range(300):
        ids = np.unique(np.minimum(rng.zipf(1.2, 50), 9_999)).astype(np.int32)
        slots = np.empty(ids.size, np.int32)
        hits = book.look(ids, slots)
        assert hits == (slots >= 0).sum()
        assert all(where[s] == r for s, r in zip(slots, ids, strict=True) if s >= 0)
        assert not {r for s, r in zip(slots, ids, strict=True) if s < 0} & set(where.values())
        missed = ids[slots < 0]
        given = np.empty(missed.size, np.int32)
        book.admit(missed, given)
        where |= {int(s): int(r) for s, r in zip(given, missed, strict=True) if s >= 0}
        assert len(set(where.values())) == len(where) <= 64
        assert all(r % 4 == s // 16 for s, r in where.items())


def test_a_row_that_two_threads_missed_comes_in_once():
    book, ids = Sets.empty(64, 10_000), np.array([5, 9], np.int32)
    first, second, found = (np.empty(2, np.int32) for _ in range(3))
    book.admit(ids, first)
    book.admit(ids, second)
    assert (first >= 0).all() and list(second) == [-1, -1]
    assert book.look(ids, found) == 2 and list(found) == list(first)
