"""Rows on the device from everywhere: the bits of the table, whatever is under way."""

from __future__ import annotations

import threading

import jax
import ml_dtypes
import numpy as np
import pytest

from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.hot_rows import Slots
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.serve import staged_rows as serve_memory
from engram_jax.serve.row_fetch import DeviceMemory, on_device
from engram_jax.serve.staged_rows import StagedMemory
from tests.serve.served import model

ROWS, DIM = 1000, 64


def table(name):
    """(HostTable, its rows as numbers)."""
    values = np.random.default_rng(0).normal(0, 1, (ROWS, DIM)).astype(np.float32)
    stored = RowFormat(name, DIM)
    made = HostTable.from_rows(stored, values)
    if name == "float32":
        return made, values
    if name == "bfloat16":
        return made, values.astype(ml_dtypes.bfloat16)
    weight, scale = made.parts
    wide = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.ldexp(wide, np.repeat(scale.astype(np.int32) - 127, 32, axis=1))
    return made, exact.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("merge_from", [1, 10**9])
@pytest.mark.parametrize("hot", [0, 1, 300, ROWS])
def test_many_fetches_at_once_give_the_tables_bits(monkeypatch, name, merge_from, hot):
    """None is waited for before all are asked for, so buffers are used again meanwhile."""
    monkeypatch.setattr(serve_memory, "MERGE_FROM", merge_from)
    program, _ = model()
    rng = np.random.default_rng(1)
    source, wanted = table(name)
    memory = StagedMemory(program, source, rng.permutation(ROWS)[:hot])
    asked = [rng.integers(0, ROWS, (3, 5, 8)).astype(np.int32) for _ in range(30)]
    found = [memory.fetch(ids) for ids in asked]
    for ids, rows in zip(asked, found, strict=True):
        assert rows.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(rows), wanted[ids])
    stats = memory.stats()
    assert stats["lookups"] == 30 * 120
    distinct = np.mean([len(np.unique(ids)) for ids in asked])
    if hot == 0:
        assert stats["moved_rows"] == (30 * distinct if merge_from == 1 else 3600)
    if hot == ROWS:
        assert (stats["moved_rows"], stats["hits_device"]) == (0, 3600)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8"])
def test_a_stored_table_on_the_device(name):
    program, _ = model()
    source, wanted = table(name)
    memory = DeviceMemory(program, on_device(program, source.parts), source.format)
    ids = np.random.default_rng(2).integers(0, ROWS, (2, 7, 4)).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(memory.fetch(ids)), wanted[ids])


def test_buffers_wait_for_what_is_computed_from_them():
    """On a CPU the device reads them where they lie."""
    stored = RowFormat("fp8", DIM)
    buffers = serve_memory._Buffers(stored)
    parts = buffers.of(10)
    assert [part.shape for part in parts] == [(10, 64), (10, 2)]
    assert all(part.ctypes.data % 64 == 0 for part in parts)
    events = []

    class Rows:
        def block_until_ready(self):
            events.append("waited")

    buffers.used_by(Rows())
    again = buffers.of(4)
    assert events == ["waited"]
    assert [a.ctypes.data for a in again] == [p.ctypes.data for p in parts]
    moved = jax.device_put(again[0])
    assert moved.unsafe_buffer_pointer() == again[0].ctypes.data  # why waiting matters


def test_statistics_do_not_wait_for_a_fetch():
    program, _ = model()
    source, _ = table("float32")
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        rows, format, counters = source.rows, source.format, source.counters

        def gather(self, ids, out):
            begun.set()
            assert go_on.wait(30)
            source.gather(ids, out)

    memory = StagedMemory(program, Slow())
    thread = threading.Thread(target=memory.fetch, args=(np.zeros((1, 2, 4), np.int32),))
    thread.start()
    assert begun.wait(30)
    asked = threading.Thread(target=memory.stats)
    asked.start()
    asked.join(10)
    waited = asked.is_alive()
    go_on.set()
    thread.join()
    assert not waited and memory.stats()["lookups"] == 8


def test_slots_against_a_dictionary():
    rng = np.random.default_rng(3)
    for count in (0, 1, 2, 7, 8, 9, 1000):
        ids = rng.choice(2**31 - 1, count, replace=False).astype(np.int32)
        slots, places = Slots(ids), {int(i): n for n, i in enumerate(ids)}
        asked = np.concatenate([ids, rng.integers(0, 2**31 - 1, 500).astype(np.int32)])
        wanted = [places.get(int(i), -1) for i in asked]
        assert len(slots) == count and slots.find(asked).tolist() == wanted
        assert slots.find(asked.astype(np.int64)).tolist() == wanted
    with pytest.raises(ValueError, match="id 5 occurs twice"):
        Slots(np.array([5, 2, 5]))
