"""Compiles one operation for one chip: its temporary memory, and the bytes it moves through HBM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.aot import trip_counts
from engram_jax.aot.compiling import MemoryUse, compile_with_text, memory_of
from engram_jax.aot.hlo_parser import Computation, Instruction, Module, leaves, parse_hlo
from engram_jax.aot.topology import Topology
from kernels_pallas import traffic

KERNEL = "tpu_custom_call"
# Instructions that move nothing themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "async-done"),
    *("optimization-barrier", "after-all", "partition-id", "replica-id", "iota"),
}


@dataclass(frozen=True)
class Operation:
    """memory: of the program. kernel_bytes: moved by Pallas kernels, computed from their grids.
    xla_bytes: moved by all other instructions (`xla_bytes`). vmem: bytes of VMEM of the kernel that
    uses most. text: the compiled module."""

    memory: MemoryUse
    kernel_bytes: int
    xla_bytes: int
    vmem: int
    text: str

    @property
    def bytes(self) -> int:
        return self.kernel_bytes + self.xla_bytes


def compile_operation(topology: Topology, function: Callable[..., Any], *args: Any) -> Operation:
    """Compile `function(*args)` for one chip of the slice.

    The compiler chooses the layouts of arguments and results, as inside a larger program.

    Args:
      args: pytrees of jax.ShapeDtypeStruct.
    """
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    anywhere = PartitionSpec()
    # shard_map: code traced inside can find the described chip (kernels_pallas.dispatch.device).
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=anywhere, out_specs=anywhere, check_vma=False
    )
    layout = Format(Layout.AUTO, NamedSharding(mesh, anywhere))
    lowered = jax.jit(mapped, in_shardings=layout, out_shardings=layout).lower(*args)
    compiled, text, _ = compile_with_text(lowered, stage="after_codegen")
    kernels = sum(traffic.kernel_bytes(mapped, *args).values())
    return Operation(memory_of(compiled), kernels, xla_bytes(text), kernel_vmem(text), text)


def kernel_vmem(text: str) -> int:
    """Bytes of VMEM of the kernel that uses most; 0 without kernels."""
    used = [0]
    for computation in parse_hlo(text).computations.values():
        for instruction in computation.instructions.values():
            if KERNEL in instruction.attributes:
                memories = instruction.backend_config.get("used_scoped_memory_configs", [])
                used += [int(m["size"]) for m in memories if m["memory_space"] == "1"]
    return max(used)


def xla_bytes(text: str) -> int:
    """Bytes that the instructions of an optimized module read from HBM and write to it.

    Every operand and result of an instruction counts once, padding included; arrays in VMEM, or
    moved by a kernel, do not. Bodies of loops count as often as they run. Raises ValueError for a
    loop whose trip count the text does not give.
    """
    module = parse_hlo(text)
    return sum(_moved(i, where) * times for i, where, times in _run(module, module.entry, 1))


def _run(
    module: Module, computation: Computation, times: int
) -> Iterator[tuple[Instruction, Computation, int]]:
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            rounds = trip_counts.trip_count(module, instruction, computation)
            if rounds is None:
                raise ValueError(f"how often {instruction.name} runs is not in the text")
            body = module.computations[str(instruction.attribute("body"))]
            yield from _run(module, body, times * rounds)
        elif instruction.opcode in ("call", "conditional"):
            for name in instruction.called:
                yield from _run(module, module.computations[name], times)
        elif instruction.opcode not in _FREE and KERNEL not in instruction.attributes:
            yield instruction, computation, times


def _moved(instruction: Instruction, where: Computation) -> int:
    if instruction.opcode == "copy-start":  # (destination, source, ...): the one is the other
        arrays = list(leaves(instruction.shape))[:2]
    else:
        operands = (where.instructions[name] for name in instruction.operands)
        arrays = [*leaves(instruction.shape), *(a for o in operands for a in leaves(o.shape))]
    return sum(array.padded_bytes for array in arrays if array.space == 0)
