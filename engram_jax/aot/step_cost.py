"""One dict, and one table, of what a compiled step costs on one device of a slice."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from engram_jax.aot.compiling import DoesNotFitError, MemoryUse, memory_of
from engram_jax.aot.data_movement import collectives, large_copies
from engram_jax.aot.hlo_parser import Module, leaves, parse_hlo
from engram_jax.aot.topology import Topology

GIB = 1 << 30
LARGEST = 12  # buffers listed of a program that does not fit


def examine(
    compiled: jax.stages.Compiled,
    text: str,
    topology: Topology,
    state: Any,
    tables: Iterable[Sequence[int]] = (),
    seconds: float = 0.0,
) -> dict[str, Any]:
    """What the compiled step costs and does, per device.

    Args:
      compiled, text, seconds: of `compiling.compile_with_text`.
      topology: the slice it was compiled for.
      state: the donated arguments: a pytree of arrays or ShapeDtypeStructs with their shardings.
      tables: the shard of each table on one device, [rows, dim].

    Returns:
      JSON-ready: argument_bytes, output_bytes, temp_bytes (as allocated: with padding),
      peak_hbm_bytes (code included) and hbm_capacity_bytes, fits; table_sized_copies in HBM, a
      number, and table_copies, which; tables_in_vmem, visits of whole tables to VMEM;
      aliased_fraction, bytes of arguments whose buffers results take over by bytes of `state`, and
      not_aliased, the donated arguments that are left; collectives, a list
      of {kind, count, bytes, name, ...}; compile_seconds; topology, chips, devices.
    """
    report = _common(memory_of(compiled), text, topology, state, tables, seconds)
    report["fits"] = report["peak_hbm_bytes"] <= topology.hbm_capacity_bytes
    return report


def does_not_fit(
    error: DoesNotFitError, topology: Topology, state: Any, tables: Iterable[Sequence[int]] = ()
) -> dict[str, Any]:
    """The same dict for a step that the compiler refused, with fits = False and `largest_buffers`:
    {bytes, name, op_name} of what is alive at its peak. Keys that the compiler left no trace of are
    None or empty."""
    nothing = MemoryUse(0, 0, 0, 0, 0, error.needed or 0)
    memory = error.memory or nothing
    report = _common(memory, error.text, topology, state, tables, error.seconds)
    if error.memory is None:
        report |= dict.fromkeys(("argument_bytes", "output_bytes", "temp_bytes"))
    origins = _origins(error.text)
    report |= {
        "fits": False,
        "message": str(error),
        "largest_buffers": [
            {"bytes": b.bytes, "name": b.name, "op_name": origins.get(b.name, "")}
            for b in error.buffers[:LARGEST]
        ],
    }
    return report


def together(programs: dict[str, dict[str, Any]], resident: int) -> dict[str, Any]:
    """One dict of programs that run one after the other, from theirs by name (`programs`).

    resident: bytes that stay on the device between them, without padding. peak_hbm_bytes is that,
      or the largest program's arguments if they are more, and what the hungriest program adds.
    """
    reports = list(programs.values())
    known = [r for r in reports if r["argument_bytes"] is not None]
    arguments = max([resident, *(r["argument_bytes"] for r in known)])
    added = max((r["peak_hbm_bytes"] - r["argument_bytes"] for r in known), default=0)
    peak = max([arguments + added, *(r["peak_hbm_bytes"] for r in reports)])
    aliased = [r["aliased_fraction"] for r in reports if r["aliased_fraction"] is not None]
    capacity = reports[0]["hbm_capacity_bytes"]
    same = {key: reports[0][key] for key in ("topology", "chips", "devices", "hbm_capacity_bytes")}
    lists = ("table_copies", "not_aliased", "collectives", "largest_buffers")
    sums = ("table_sized_copies", "tables_in_vmem", "compile_seconds")
    return {
        **same,
        "argument_bytes": arguments,
        "output_bytes": max((r["output_bytes"] for r in known), default=None),
        "temp_bytes": max((r["temp_bytes"] for r in known), default=None),
        "peak_hbm_bytes": peak,
        "fits": peak <= capacity and all(r["fits"] for r in reports),
        "aliased_fraction": min(aliased, default=None),
        **{key: sum(r[key] or 0 for r in reports) for key in sums},
        **{key: [x for r in reports for x in r.get(key, [])] for key in lists},
        "programs": programs,
    }


def _common(
    memory: MemoryUse,
    text: str,
    topology: Topology,
    state: Any,
    tables: Iterable[Sequence[int]],
    seconds: float,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "topology": topology.name,
        "chips": topology.chips,
        "devices": len(topology.devices),
        "argument_bytes": memory.argument,
        "output_bytes": memory.output,
        "temp_bytes": memory.temp,
        "peak_hbm_bytes": memory.peak,
        "hbm_capacity_bytes": topology.hbm_capacity_bytes,
        "compile_seconds": round(seconds, 2),
    }
    if not text:
        return report | {
            "table_sized_copies": None,
            "tables_in_vmem": None,
            "table_copies": [],
            "aliased_fraction": None,
            "not_aliased": [],
            "collectives": [],
        }
    module = parse_hlo(text)
    large = large_copies(module, tables)
    copies = [copy for copy in large if not copy.vmem]
    donated, aliased = shard_bytes(state), aliased_bytes(module)
    return report | {
        "table_sized_copies": len(copies),
        "tables_in_vmem": len(large) - len(copies),
        "table_copies": [dataclasses.asdict(copy) for copy in copies],
        "aliased_fraction": aliased / donated if donated else 1.0,
        "not_aliased": not_aliased(module),
        "collectives": [dataclasses.asdict(c) for c in collectives(module)],
    }


def shard_bytes(tree: Any) -> int:
    """Bytes of a pytree on one device, without padding; a leaf without a sharding is whole."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _numbers(header: str, key: str, entry: str) -> list[int]:
    """The parameter numbers in `key={ ... }` of a module's header, each found by `entry`."""
    start = header.find(f" {key}={{")
    if start < 0:
        return []
    depth, begin = 0, header.index("{", start)
    for brace in re.finditer(r"[{}]", header[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return [int(n) for n in re.findall(entry, header[begin : begin + brace.end()])]
    raise ValueError(f"unbalanced braces in the module's {key}")


def aliased_bytes(module: Module) -> int:
    """Bytes (without padding) of the parameters whose buffers results take over, by the module's
    input_output_alias: `{result}: (parameter, {}, may-alias)`."""
    numbers = set(_numbers(module.header, "input_output_alias", r": \((\d+),"))
    parameters = module.entry.parameters
    return sum(a.bytes for n in numbers for a in leaves(parameters[n].shape))


def not_aliased(module: Module) -> list[str]:
    """Donated parameters that no result took over, by the module's buffer_donor."""
    numbers = _numbers(module.header, "buffer_donor", r"\((\d+),")
    parameters = module.entry.parameters
    return [parameters[n].op_name or parameters[n].name for n in numbers]


def _origins(text: str) -> dict[str, str]:
    """op_name by instruction."""
    computations = parse_hlo(text).computations.values() if text else ()
    return {i.name: i.op_name for c in computations for i in c.instructions.values()}


# ---- for a terminal ------------------------------------------------------------------------------


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f} GiB"


def as_table(report: dict[str, Any]) -> str:
    """A report as lines for a terminal."""
    per_chip = report["devices"] // report["chips"]
    unit = "chip" if per_chip == 1 else f"device ({per_chip} per chip)"
    peak, capacity = report["peak_hbm_bytes"], report["hbm_capacity_bytes"]
    lines = [
        f"{report['topology']}: {report['chips']} chips, per {unit}",
        f"  arguments      {_gib(report['argument_bytes']):>12}",
        f"  temporaries    {_gib(report['temp_bytes']):>12}",
        f"  peak           {_gib(peak):>12}  of {_gib(capacity)} ({peak / capacity:.0%}):"
        f" {'fits' if report['fits'] else 'DOES NOT FIT'}",
    ]
    if report["aliased_fraction"] is not None:
        names = report["not_aliased"]
        left = f"; not: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
        lines.append(f"  state aliased  {report['aliased_fraction']:>12.1%}{left}")
    if report["table_sized_copies"] is not None:
        lines.append(f"  table copies   {report['table_sized_copies']:>12}")
    lines += [f"    {c['name']} {c['shape']} {c['op_name']}" for c in report["table_copies"]]
    if report["tables_in_vmem"]:
        lines.append(f"  visits to VMEM {report['tables_in_vmem']:>12}  of a whole table: it fits")
    lines.append(f"  compiled in    {report['compile_seconds']:>10.1f} s")
    kinds: dict[str, list[int]] = {}
    for c in report["collectives"]:
        label = c["kind"]
        if c["unknown_trips"] or c["conditional"]:
            label += ", one round of what may not run"
        total = kinds.setdefault(label, [0, 0])
        total[0] += c["count"]
        total[1] += c["bytes"]
    if kinds:
        lines.append("  received per step")
    for label, (count, size) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        lines.append(f"    {label:<24} {count:>6} x, {size / 2**20:>10.1f} MiB")
    for b in report.get("largest_buffers", []):
        lines.append(f"  {_gib(b['bytes']):>12}  {b['name']}  {b['op_name']}")
    return "\n".join(lines)
