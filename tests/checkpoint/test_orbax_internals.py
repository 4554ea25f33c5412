"""Into what pieces arrays are written; what a save that failed leaves is not printed."""

from __future__ import annotations

import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from engram_jax.checkpoint import manager, orbax_internals
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.orbax_internals import quiet_closed_loops
from engram_jax.memory.table import TableLayout


@pytest.mark.parametrize(
    ("rows", "piece"),
    [
        (8192, 512),  # as large as a piece may be
        (8191, 8191),  # a prime number of rows: not 8,191 pieces
        (2 * 8191, 16382),  # two pieces would be too large, and 8,191 too many
        (300, 300),  # small
        (3 * 173 * 2, 346),
    ],
)
def test_arrays_are_written_in_pieces_that_are_neither_large_nor_many(
    rows, piece, tmp_path, monkeypatch
):
    monkeypatch.setattr(orbax_internals, "_PIECE", 512 * 32 * 4)
    monkeypatch.setattr(orbax_internals, "_SMALLEST_PIECE", 64 * 32 * 4)
    values = np.arange(rows * 32, dtype=np.float32).reshape(rows, 32)
    with Checkpointer(tmp_path / "run") as made:
        made.save(1, {"x": values})
        made.wait()
        found = made.restore(1, {"x": np.zeros_like(values)}).state["x"]
    np.testing.assert_array_equal(found, values)
    store = {"driver": "ocdbt", "base": f"file://{tmp_path}/run/checkpoints/1/state", "path": "x/"}
    opened = ts.open({"driver": "auto", "kvstore": store}).result()
    assert opened.chunk_layout.read_chunk.shape == (piece, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [640, 641, 1500])
def test_a_large_array_is_read_in_pieces(rows, dtype, tmp_path, monkeypatch):
    """Bit for bit; rows that are not stored are zeros."""
    read = []
    actual = orbax_internals.read_pieces
    monkeypatch.setattr(orbax_internals, "_PIECE", 64 * 32 * 4)
    monkeypatch.setattr(manager, "read_pieces", lambda *a: read.append(a[1]) or actual(*a))
    values = jax.random.normal(jax.random.key(0), (rows, 32)).astype(dtype)
    whole = np.asarray(values)
    state = {"table": values, "small": np.arange(3)}
    with Checkpointer(tmp_path / "run") as made:
        made.save(1, state, true_rows={"table": rows - 7})
        made.wait()
        found = made.restore(
            1,
            {"table": jax.ShapeDtypeStruct((rows + 9, 32), dtype), "small": np.zeros(3, int)},
            true_rows={"table": rows - 7},
        ).state
        on_device = jax.device_put(jnp.zeros((rows + 9, 32), dtype), jax.devices()[0])
        again = made.restore(
            1, {"table": on_device, "small": np.zeros(3, int)}, true_rows={"table": rows - 7}
        ).state
    assert read == ["table"]  # without a sharding Orbax reads
    expected = np.zeros((rows + 9, 32), whole.dtype)
    expected[: rows - 7] = whole[: rows - 7]
    for table in (found["table"], again["table"]):
        assert np.asarray(table).tobytes() == expected.tobytes()
    np.testing.assert_array_equal(again["small"], [0, 1, 2])


def test_nothing_but_a_large_array_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_internals, "_PIECE", 64 * 32 * 4)
    table = jax.random.normal(jax.random.key(0), (1000, 32))
    with Checkpointer(tmp_path / "run") as made:
        made.save(1, {"table": table, "small": np.arange(3)})
        made.wait()
        found = made.restore(1, {"table": table}, whole=False).state
    assert found.keys() == {"table"}
    np.testing.assert_array_equal(found["table"], table)


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 128])
@pytest.mark.parametrize("rows", [65_537, 2_097_143, 15_200_003, 1_000_000_007])
def test_the_rows_of_a_large_table_can_be_divided(rows, devices):
    """On every device, whatever the primes of its heads add up to."""
    layout = TableLayout(rows, devices)
    length = layout.rows_per_device
    assert rows <= layout.stored < rows + devices * max(1025, 1024 * devices)
    assert length % devices == 0
    assert length <= 1 << 16 or length % 1024 == 0


async def async_serialize_from_host() -> None:
    """Named like Orbax's, of whose fragments some are never written."""


async def another() -> None: ...


def test_fragments_that_were_never_written_are_not_warned_of():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_closed_loops()
        async_serialize_from_host()  # never awaited
        another()
        gc.collect()
    assert len(told) == 1 and "another" in str(told[0].message)
