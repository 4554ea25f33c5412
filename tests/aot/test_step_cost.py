"""A table's step, compiled: rows gathered, added to and set, everything donated."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.aot import compiling, step_cost
from engram_jax.aot.compiling import DoesNotFitError, compile_with_text, is_hbm_shortage

DIM, LOOKUPS = 80, 4096
ROWS = 1_000_000  # a table that fits into VMEM (128 MiB on a v5e) would be copied there


def update(table, moment, ids, gradients):
    """Of one device: its rows, its ids."""
    how = {"unique_indices": True, "indices_are_sorted": True, "mode": "drop"}
    moments = moment.at[ids].get(mode="fill", fill_value=0) * 0.9 + gradients
    rows = table.at[ids].get(mode="fill", fill_value=0)
    return table.at[ids].add(-moments, **how), moment.at[ids].set(moments, **how), rows


def examined(tpu_slice, name, rows, row_major=True, donate=(0, 1)):
    """The report of `update` on tables of `rows` rows per device, and the program."""
    topology, mesh = tpu_slice(name)
    sharding = NamedSharding(mesh, P("x"))
    table_format = Format(Layout((0, 1)), sharding) if row_major else sharding
    n = mesh.size
    table = jax.ShapeDtypeStruct((rows * n, DIM), jnp.float32, sharding=table_format)
    ids = jax.ShapeDtypeStruct((LOOKUPS * n,), jnp.int32, sharding=sharding)
    gradients = jax.ShapeDtypeStruct((LOOKUPS * n, DIM), jnp.float32, sharding=sharding)
    step = jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False),
        in_shardings=(table_format, table_format, sharding, sharding),
        out_shardings=(table_format, table_format, sharding),
        donate_argnums=donate,
    )
    state, tables = (table, table), [(rows, DIM)]
    try:
        compiled, text, seconds = compile_with_text(step.lower(table, table, ids, gradients))
    except DoesNotFitError as error:
        return step_cost.does_not_fit(error, topology, state, tables), None
    return step_cost.examine(compiled, text, topology, state, tables, seconds), compiled


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_row_major_tables_are_updated_in_place(tpu_slice, name):
    rows = ROWS
    found, compiled = examined(tpu_slice, name, rows)
    assert found["fits"] is True
    assert found["table_sized_copies"] == 0
    assert found["aliased_fraction"] == 1.0 and found["not_aliased"] == []
    # 80 lie in 128 lanes; the rest is ids and gradients (80 in 128 lanes, or 80 sublanes).
    tables = 2 * rows * 128 * 4
    assert tables < found["argument_bytes"] <= tables + LOOKUPS * (128 + 2) * 4
    assert found["temp_bytes"] < rows * DIM * 4
    assert found["argument_bytes"] < found["peak_hbm_bytes"] < 2 * found["argument_bytes"]
    assert found["collectives"] == [] and found["compile_seconds"] > 0
    assert json.loads(json.dumps(found)) == found
    stats = compiled.memory_analysis()
    assert found["temp_bytes"] == stats.temp_size_in_bytes
    assert found["topology"] == name and found["chips"] == found["devices"] == 4


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_the_default_layout_copies_whole_tables(tpu_slice, name):
    rows = ROWS
    found, _ = examined(tpu_slice, name, rows, row_major=False)
    assert found["table_sized_copies"] >= 4  # each of two tables, in and out
    assert all(c["bytes"] == rows * DIM * 4 for c in found["table_copies"])
    assert found["temp_bytes"] >= rows * DIM * 4
    assert found["argument_bytes"] < 2 * rows * 128 * 4  # not padded: 80 sublanes


def test_what_is_not_donated_is_not_aliased(tpu_slice):
    found, _ = examined(tpu_slice, "v5e:2x2", ROWS, donate=(0,))
    assert found["aliased_fraction"] == 0.5
    assert found["table_sized_copies"] == 1


def test_a_step_that_does_not_fit(tpu_slice):
    rows = 25_000_000  # 2 tables of 11.9 GiB with padding
    found, _ = examined(tpu_slice, "v5e:2x2", rows)
    assert found["fits"] is False
    padded = rows * 128 * 4
    assert found["peak_hbm_bytes"] == pytest.approx(2 * padded, rel=0.01)
    assert found["peak_hbm_bytes"] > found["hbm_capacity_bytes"]
    assert found["argument_bytes"] == pytest.approx(2 * padded, rel=0.01)
    assert [b["bytes"] for b in found["largest_buffers"][:2]] == [padded, padded]
    assert found["largest_buffers"][2]["bytes"] < padded / 100
    assert found["table_sized_copies"] == 0 and found["aliased_fraction"] == 1.0
    text = step_cost.as_table(found)
    assert "DOES NOT FIT" in text and "23.8" in text and "15.75 GiB" in text
    fitting, _ = examined(tpu_slice, "v5p:2x2x1", rows)
    assert fitting["fits"] is True
    assert set(fitting) == set(found) - {"message", "largest_buffers"}


def test_the_table_for_a_terminal():
    one = {"kind": "all-to-all", "count": 15, "bytes": 3 << 20, "name": "jit(f)/exchange"}
    flags = {"unknown_trips": False, "conditional": False}
    text = step_cost.as_table(
        {
            "topology": "tpu7x:2x2x1",
            "chips": 4,
            "devices": 8,
            "argument_bytes": 5 << 30,
            "output_bytes": 5 << 30,
            "temp_bytes": 1 << 29,
            "peak_hbm_bytes": 6 << 30,
            "hbm_capacity_bytes": 24 << 30,
            "fits": True,
            "compile_seconds": 12.34,
            "aliased_fraction": 0.75,
            "not_aliased": ["state['a']"],
            "table_sized_copies": 1,
            "tables_in_vmem": 3,
            "table_copies": [{"name": "copy.1", "shape": "f32[9,80]", "op_name": "t"}],
            "collectives": [one | flags, one | flags, one | flags | {"unknown_trips": True}],
        }
    ).splitlines()
    assert text[0] == "tpu7x:2x2x1: 4 chips, per device (2 per chip)"
    assert any("peak" in t and "6.00 GiB" in t and "(25%): fits" in t for t in text)
    assert any("75.0%; not: state['a']" in t for t in text)
    assert "    copy.1 f32[9,80] t" in text
    assert any(t.split()[:4] == ["visits", "to", "VMEM", "3"] for t in text)
    assert any(t.split() == ["all-to-all", "30", "x,", "6.0", "MiB"] for t in text)
    assert any("may not run" in t and "15 x" in t and "3.0 MiB" in t for t in text)


def test_shard_bytes(tpu_slice):
    _, mesh = tpu_slice("v5e:2x2")
    tree = {
        "sharded": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=NamedSharding(mesh, P("x"))),
        "whole": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=NamedSharding(mesh, P())),
    }
    assert step_cost.shard_bytes(tree) == 2 * 3 * 4 + 8 * 3 * 2


ASSIGNED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. \
Ran out of memory in memory space hbm. Used 17.50G of 15.48G hbm. Exceeded hbm capacity by 2.02G.

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(f)/a"
     Shape: f32[32768,32768]{1,0:T(8,128)}
     Unpadded size: 4.00G
     XLA label: %fusion.3 = fusion(%x), kind=kLoop
     Allocation type: HLO temp
     ==========================

  2. Size: 512.5M
     Shape: f32[1,2]
     XLA label: copy.4 = copy(%y)
"""


def test_messages_of_the_compiler():
    assert is_hbm_shortage(ASSIGNED)
    used, of = compiling.needed_and_available(ASSIGNED)
    assert (used, of) == (17.5 * 2**30, round(15.48 * 2**30))
    assert [(b.name, b.bytes) for b in compiling._listed_buffers(ASSIGNED)] == [
        ("fusion.3", 4 << 30),
        ("copy.4", round(512.5 * 2**20)),
    ]
    vmem = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space"
    assert not is_hbm_shortage(f"{vmem} vmem while allocating")


def test_a_cached_program_has_its_text_too(tmp_path):
    saved = {
        name: jax.config.values[name]
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        lowered = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((32, 32)))
        lowered.compile()
        compiled, text, seconds = compile_with_text(lowered)
    finally:
        for name, value in saved.items():
            jax.config.update(name, value)
    assert "ENTRY" in text and seconds > 0
    assert compiled(jnp.ones((32, 32))).shape == (32, 32)
    assert jax.config.values["jax_enable_compilation_cache"] is True
