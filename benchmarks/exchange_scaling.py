"""What the rows of one table cost a chip, by the compiled program: 16, 64 and 128 chips.

    python -m benchmarks.exchange_scaling --json=benchmarks/results/exchange_scaling.json

One Engram-27B table, 40,960 tokens per chip (1280 x 4096 on 128), compiled for v5p slices by
libtpu; nothing runs. Beside the exchange stands what XLA makes of a plain gather from the same
sharded table. `needed`: the distinct rows of a chip's lookups x the bytes of a row, at the share
that the exchange is planned for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from configs import engram27b
from engram_jax.aot.compile_step import _addressing
from engram_jax.aot.compiling import compile_with_text
from engram_jax.aot.data_movement import collectives, large_copies
from engram_jax.aot.hlo_parser import parse_hlo
from engram_jax.aot.topology import slice_topology
from engram_jax.config import parse_config
from engram_jax.hardware.xla_flags import options_for
from engram_jax.memory.exchange import LOOKUPS, ROW_SHARDED, Exchange
from engram_jax.sharding.rules import make_mesh
from engram_jax.training.state import build_training

SLICES = ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8")
TOKENS_PER_CHIP, DISTINCT = 40_960, 0.75


def measure(name: str) -> dict[str, Any]:
    """One slice: bytes per chip of the exchange and of the plain gather."""
    topology = slice_topology(name)
    config = parse_config(engram27b.get_config())
    sequences = topology.chips * TOKENS_PER_CHIP // config.data.seq_len
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=sequences),
        mesh=dataclasses.replace(config.mesh, distinct=DISTINCT),
    )
    program = build_training(config, _addressing(config), make_mesh(config.mesh, topology.devices))
    exchange = program.exchanges()["1"]
    row_bytes = config.model.engram.dim * jnp.dtype(config.model.dtype).itemsize
    needed = round(program.lookups * DISTINCT) * row_bytes
    forward, backward = _exchanged(exchange, program, topology)
    plain = _gathered(exchange, program, topology)
    return {
        "slice": name,
        "chips": topology.chips,
        "lookups_per_chip": program.lookups,
        "needed_bytes": needed,
        "capacity": exchange.capacity,
        "forward": forward,
        "forward_over_needed": forward["rows"] / needed,
        "backward": backward,
        "backward_over_needed": backward["rows"] / (2 * needed),  # float32 sums
        "plain_gather": plain,
        "plain_over_needed": plain["bytes"] / needed,
    }


def _arrays(exchange: Exchange, program: Any) -> tuple[Any, Any, Any]:
    """Table, addresses and gradients, in shapes."""
    config, mesh = program.config, program.mesh
    dim = config.model.engram.dim
    shape = (config.data.batch_size, config.data.seq_len, config.model.engram.heads)
    table = Format(Layout(major_to_minor=(0, 1)), NamedSharding(mesh, ROW_SHARDED))

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return (
        array((exchange.layout.stored, dim), jnp.float32, table),
        array(shape, jnp.int32, NamedSharding(mesh, LOOKUPS)),
        array((*shape, dim), jnp.dtype(config.model.dtype), NamedSharding(mesh, LOOKUPS)),
    )


def _exchanged(exchange: Exchange, program: Any, topology: Any) -> tuple[dict, dict]:
    """Bytes that a chip receives, forward (ids, rows) and backward (gradients)."""
    table, addresses, gradients = _arrays(exchange, program)
    dtype = jnp.dtype(program.config.model.dtype)

    def forward(table: jax.Array, ids: jax.Array) -> jax.Array:
        return exchange.fetch(table, ids, exchange.plan(ids), dtype)

    def backward(ids: jax.Array, gradients: jax.Array) -> Any:
        return exchange.send(gradients, exchange.plan(ids))

    shard = [(exchange.layout.rows_per_device, program.config.model.engram.dim)]
    return (
        _received(jax.jit(forward).lower(table, addresses), topology, shard),
        _received(jax.jit(backward).lower(addresses, gradients), topology, shard),
    )


def _received(lowered: Any, topology: Any, shard: list) -> dict[str, Any]:
    """By the first round's all-to-alls: those of rows are the ones in floating point."""
    _, text, seconds = compile_with_text(lowered, options_for(topology.generation))
    module = parse_hlo(text)
    moved = [c for c in collectives(module) if not c.unknown_trips and not c.conditional]
    swaps = sorted((c for c in moved if c.kind == "all-to-all"), key=lambda c: -c.bytes)
    return {
        "rows": swaps[0].bytes,
        "rows_padded": swaps[0].padded_bytes,
        "ids": swaps[1].bytes,
        "others": sum(c.bytes for c in moved) - swaps[0].bytes - swaps[1].bytes,
        "table_sized_copies": len(large_copies(module, shard)),
        "compile_seconds": round(seconds, 1),
    }


def _gathered(exchange: Exchange, program: Any, topology: Any) -> dict[str, Any]:
    """What XLA's partitioner makes of `table[addresses]`, the table cut by rows over all chips."""
    table, addresses, _ = _arrays(exchange, program)
    rows = NamedSharding(program.mesh, LOOKUPS)
    gather = jax.jit(
        lambda table, ids: table.at[ids].get(mode="promise_in_bounds").astype(jnp.bfloat16),
        out_shardings=rows,
    )
    try:
        _, text, seconds = compile_with_text(
            gather.lower(table, addresses), options_for(topology.generation)
        )
        fits = True
    except Exception as error:  # too much HBM: the text is there all the same
        text, seconds, fits = getattr(error, "text", ""), getattr(error, "seconds", 0.0), False
    found = collectives(parse_hlo(text)) if text else []
    return {
        "bytes": sum(c.bytes for c in found),
        "kinds": sorted({c.kind for c in found}),
        "fits": fits,
        "compile_seconds": round(seconds, 1),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/scaling.md."""
    mib = 2**20
    lines = [
        "| chips | needed | rows forward | gradients back | ids | plain sharded gather |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        forward, backward, plain = r["forward"], r["backward"], r["plain_gather"]
        lines.append(
            f"| {r['chips']} | {r['needed_bytes'] / mib:.1f} MiB"
            f" | {forward['rows'] / mib:.1f} MiB, {r['forward_over_needed']:.2f}x"
            f" | {backward['rows'] / mib:.1f} MiB, {r['backward_over_needed']:.2f}x"
            f" | {forward['ids'] / mib:.1f} MiB"
            f" | {plain['bytes'] / mib:,.0f} MiB, {r['plain_over_needed']:.0f}x"
            f" ({', '.join(plain['kinds'])}{'' if plain['fits'] else '; does not fit'}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for name in SLICES:
        results.append(measure(name))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"jax": jax.__version__, "slices": results}, indent=1))


if __name__ == "__main__":
    main()
