"""Tiers in DRAM and on disk against plain indexing of the stored bytes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engram_jax.memory.store import file_table, gather_rows
from engram_jax.memory.store.dram import HostTable, host_array
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.row_source import RowSource
from tests.memory.store.tables import FORMATS, numbers, stored

ROWS = 1_237
KINDS = ["host", "from_rows", "loaded", "disk", "disk, scales resident"]


def table(kind: str, row_format: RowFormat, rows: np.ndarray, folder) -> RowSource:
    if kind == "host":
        return HostTable(row_format, stored(row_format, rows))
    if kind == "from_rows":
        return HostTable.from_rows(row_format, rows)
    path = folder / "memory.safetensors"
    write_memory(path, {"7": (row_format, len(rows), [rows])}, "f")
    if kind == "loaded":
        return open_memory(path).host("7")
    last = row_format.parts[-1][0]
    return open_memory(path).disk("7", (last,) if kind.endswith("resident") else ())


def same(got, parts: list[np.ndarray], ids: np.ndarray) -> None:
    for buffer, part in zip(got, parts, strict=True):
        np.testing.assert_array_equal(buffer, part[ids])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_format", FORMATS, ids=str)
def test_rows_are_those_of_numpy(kind, row_format, tmp_path):
    rows = numbers(row_format, ROWS)
    source, parts = table(kind, row_format, rows, tmp_path), stored(row_format, rows)
    assert source.rows == ROWS and source.format == row_format
    rng = np.random.default_rng(1)
    for dtype in (np.int32, np.int64):
        for count in (0, 1, 2, 100, 3_000):
            ids = rng.integers(0, ROWS, count).astype(dtype)
            ids[: count // 4] = ids[count // 2 :][: count // 4]  # duplicates
            ids[-1:] = ROWS - 1
            for some in (ids, np.sort(ids), ids[::-1]):
                ring = row_format.empty(count + 9)
                for buffer in ring:
                    buffer[:] = 77
                source.gather(some, tuple(buffer[:count] for buffer in ring))
                same([buffer[:count] for buffer in ring], parts, some)
                assert all((buffer[count:] == 77).all() for buffer in ring)


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("wrong", [-1, ROWS, 2**31 - 1, -(2**31)])
def test_a_row_outside_is_refused_before_anything_is_read(kind, wrong, tmp_path):
    row_format = FORMATS[2]
    source = table(kind, row_format, numbers(row_format, ROWS), tmp_path)
    out = row_format.empty(4)
    for buffer in out:
        buffer[:] = 9
    with pytest.raises(IndexError, match=rf"row {wrong} \(position 2\): must be in 0 to 1236"):
        source.gather(np.array([0, 1, wrong, 2], np.int32), out)
    assert all((buffer == 9).all() for buffer in out)
    assert source.counters.snapshot().lookups == 0


def test_wrong_ids_and_buffers_are_refused():
    row_format = FORMATS[3]
    source = HostTable.from_rows(row_format, numbers(row_format, 5))
    ids = np.arange(3, dtype=np.int32)
    weight, scale = row_format.empty(3)
    for bad_ids in (ids.astype(np.uint32), ids.reshape(1, 3), ids.astype(np.float32)):
        with pytest.raises(ValueError, match="must be int32 or int64"):
            source.gather(bad_ids, (weight, scale))
    with pytest.raises(ValueError, match="one for each of 2 parts"):
        source.gather(ids, (weight,))
    for bad in (weight[:2], weight.view(np.int8), weight[:, ::2], np.empty((3, 257), np.uint8)):
        with pytest.raises(ValueError, match="buffer of part weight"):
            source.gather(ids, (bad, scale))
    with pytest.raises(ValueError, match="must be C-contiguous"):
        source.gather(ids, (np.asfortranarray(weight), scale))
    with pytest.raises(ValueError, match="must be uint8"):
        HostTable(row_format, [weight])


def test_a_large_gather_is_shared_by_the_cores(monkeypatch):
    row_format = RowFormat("float32", 64)
    rows = numbers(row_format, 500)
    ids = np.random.default_rng(2).integers(0, 500, 10_000).astype(np.int32)
    pieces = []
    whole = gather_rows.split

    def watched(count, work, pool="memory"):
        def seen(begin, end):
            pieces.append((begin, end))
            work(begin, end)

        whole(count, seen, pool)

    monkeypatch.setattr(gather_rows, "split", watched)
    monkeypatch.setattr(gather_rows, "cores", lambda: 3)
    out = row_format.empty(ids.size)
    HostTable.from_rows(row_format, rows).gather(ids, out)
    same(out, stored(row_format, rows), ids)
    assert sorted(pieces) == [(10_000 * i // 12, 10_000 * (i + 1) // 12) for i in range(12)]


def test_an_error_in_another_thread_comes_back(monkeypatch):
    monkeypatch.setattr(gather_rows, "cores", lambda: 2)
    here, both = threading.current_thread(), threading.Barrier(2, timeout=20)

    def work(begin, end):
        if begin < 20:  # the first two pieces: one for each thread
            both.wait()
        if threading.current_thread() is not here:
            raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        gather_rows.split(80, work)


def test_every_piece_is_done_once_and_before_the_end(monkeypatch):
    monkeypatch.setattr(gather_rows, "cores", lambda: 3)
    for count in (0, 1, 2, 5, 100):
        done = np.zeros(count, int)

        def work(begin, end, done=done):
            done[begin:end] += 1

        gather_rows.split(count, work)
        assert (done == 1).all()


def test_the_counters(tmp_path):
    row_format = FORMATS[3]  # 16 rows and 512 scales to a block of 4,096 bytes
    rows = numbers(row_format, 2_000)
    host = HostTable.from_rows(row_format, rows)
    on_disk = table("disk", row_format, rows, tmp_path)
    for source in (host, on_disk):
        source.gather(np.array([5, 3, 3, 40, 1_999], np.int64), row_format.empty(5))
        source.gather(np.empty(0, np.int32), row_format.empty(0))
    got = host.counters.snapshot()
    assert (got.calls, got.lookups, got.hits, got.rows_read) == (2, 5, 5, 5)
    assert got.bytes_read == 5 * 264 and got.seconds > 0
    # Weights: blocks 0, 2 and 124. Scales: 0 and 3, the last one of 464 rows.
    assert on_disk.counters.snapshot().bytes_read == 3 * 4096 + 4096 + 464 * 8


def test_threads_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gather_rows, "INLINE_BYTES", 1 << 12)
    monkeypatch.setattr(file_table, "_SPLIT", 50)
    row_format = FORMATS[3]
    rows = numbers(row_format, ROWS)
    parts = stored(row_format, rows)
    sources = [table(kind, row_format, rows, tmp_path) for kind in ("host", "disk")]
    failures = []

    def hammer(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(30):
                ids = rng.integers(0, ROWS, rng.integers(1, 300))
                for source in sources:
                    out = row_format.empty(ids.size)
                    source.gather(ids, out)
                    same(out, parts, ids)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(source.counters.snapshot().calls == 180 for source in sources)


@pytest.mark.parametrize("huge_pages", [True, False])
def test_large_arrays_begin_as_zeros(huge_pages):
    array = host_array(9_000, 264, huge_pages=huge_pages)
    assert array.shape == (9_000, 264) and not array.any()
    array[:] = 3
    assert array.flags.c_contiguous and array[8_999, 263] == 3


@pytest.mark.parametrize("width", [32, 96, 256, 264, 40])
@pytest.mark.parametrize("offset", [0, 32, 16, 1])
def test_large_gathers_write_their_rows_and_nothing_else(width, offset, monkeypatch):
    """Past the caches where rows and buffer are multiples of 32 bytes, and through them else."""
    monkeypatch.setattr(gather_rows, "INLINE_BYTES", 1 << 10)
    rng = np.random.default_rng(width + offset)
    rows = rng.integers(0, 256, (ROWS, width), np.uint8)
    ids = rng.integers(0, ROWS, 500).astype(np.int32)
    (whole,) = RowFormat("float32", 64).empty(1_000)
    assert whole.ctypes.data % 64 == 0
    whole[:] = 7
    memory = whole.reshape(-1)
    end = offset + len(ids) * width
    gather_rows.gather_rows(rows, ids, memory[offset:end].reshape(-1, width))
    np.testing.assert_array_equal(memory[offset:end].reshape(-1, width), rows[ids])
    assert (memory[:offset] == 7).all() and (memory[end:] == 7).all()
