"""Finds the collectives of a compiled step, with their bytes, and its copies of whole tables.

Pure functions of the text of an optimized, partitioned HLO module, in which every shape is one
device's.

Bytes are those that a device receives in one run of the module, computed from unpadded shapes; n
devices form a group:

  all-gather            (n - 1) / n of the output
  reduce-scatter        (n - 1) times the output
  all-reduce            2 (n - 1) / n of the output: a reduce-scatter and an all-gather
  all-to-all            (n - 1) / n of the output
  collective-permute    the output
  ragged-all-to-all     the output: an upper bound, since the true sizes depend on data

`padded_bytes` counts the same for arrays as stored, rounded up to whole tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from engram_jax.aot.hlo_parser import Array, Computation, Instruction, Module, leaves, parse_hlo
from engram_jax.aot.trip_counts import trip_count

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Collective:
    """One collective of the program, or several of the same kind, origin and size.

    kind: one of KINDS.
    name: op_name of its metadata ("jit(step)/exchange/all_to_all"), else the instruction's name.
    count: how often it runs in one run of the module, multiplied by known trip counts of loops.
    bytes, padded_bytes: received by one device in all `count` runs (see the module's docstring).
    group_size: n, the devices of a group.
    unknown_trips: it is in a loop whose trip count the text does not give; counted as one round.
    conditional: it is in a branch that may not be taken; counted as if it were.
    """

    kind: str
    name: str
    count: int
    bytes: int
    padded_bytes: int
    group_size: int
    unknown_trips: bool = False
    conditional: bool = False


@dataclass(frozen=True)
class LargeCopy:
    """An instruction that fills a buffer of a table's size: `bytes` of values, without padding.

    vmem: it copies the table into VMEM or back. XLA does this with arrays that fit there: a bounded
    cost, and no HBM.
    """

    name: str
    opcode: str
    shape: str
    bytes: int
    op_name: str
    vmem: bool = False


def collectives(text: str | Module) -> list[Collective]:
    """Every collective of the module, largest first; equal ones are added up."""
    module = parse_hlo(text) if isinstance(text, str) else text
    found: dict[tuple, Collective] = {}
    for place in _places(module, module.entry, _Place(1, False, False)):
        for one in collectives_in(module, place.computation):
            one = replace(
                one,
                count=place.count,
                bytes=one.bytes * place.count,
                padded_bytes=one.padded_bytes * place.count,
                unknown_trips=place.unknown_trips,
                conditional=place.conditional,
            )
            size = one.bytes // place.count if place.count else 0
            key = one.kind, one.name, size, one.group_size, one.unknown_trips, one.conditional
            before = found.get(key)
            if before:
                one = replace(
                    one,
                    count=one.count + before.count,
                    bytes=one.bytes + before.bytes,
                    padded_bytes=one.padded_bytes + before.padded_bytes,
                )
            found[key] = one
    return sorted(found.values(), key=lambda c: (-c.bytes, c.kind, c.name))


@dataclass(frozen=True)
class _Place:
    """A computation, and how it is reached from the entry."""

    count: int
    unknown_trips: bool
    conditional: bool
    computation: Computation = None  # type: ignore[assignment]


def _places(module: Module, computation: Computation, place: _Place) -> Iterator[_Place]:
    """The computation and all that it calls: loops, branches, calls, fusions, async wrappers."""
    yield replace(place, computation=computation)
    for instruction in computation.instructions.values():
        inner = place
        if instruction.opcode == "while":
            trips = trip_count(module, instruction, computation)
            if trips is None:
                inner = replace(place, unknown_trips=True)
            else:
                inner = replace(place, count=place.count * trips)
        elif instruction.opcode == "conditional":
            inner = replace(place, conditional=True)
        for name in instruction.called:
            yield from _places(module, module.computations[name], inner)


def collectives_in(module: Module, computation: Computation) -> Iterator[Collective]:
    """The collectives among a computation's own instructions, each counted as run once."""
    yield from collectives_by_name(module, computation).values()


def collectives_by_name(module: Module, computation: Computation) -> dict[str, Collective]:
    """The same by the names of their instructions, in the order of the schedule."""
    starts = starts_collective(computation)
    found = {}
    for instruction in computation.instructions.values():
        # The done of an asynchronous pair is skipped: "all-gather-done" is not in KINDS.
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # TPUs hide a collective by fusing parts of it into compute: it then appears in the fusion
        # that starts it, in every fusion that continues it and in the one that ends it.
        if "async_collective_fusion_config" in instruction.backend_config and not starts:
            continue
        arrays = list(leaves(instruction.shape))
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            _, outputs, *_ = instruction.shape  # type: ignore[misc]  # (inputs, outputs, ...)
            arrays = list(leaves(outputs))
        n = _group_size(instruction, module)
        if kind == "all-reduce" and _is_scattered(instruction, computation, n):
            kind, n_bytes = "reduce-scatter", Fraction(n - 1, n)
        else:
            n_bytes = {
                "all-gather": Fraction(n - 1, n),
                "reduce-scatter": Fraction(n - 1),
                "all-reduce": Fraction(2 * (n - 1), n),
                "all-to-all": Fraction(n - 1, n),
            }.get(kind, Fraction(1))
        found[instruction.name] = Collective(
            kind,
            instruction.op_name or instruction.name,
            1,
            math.ceil(n_bytes * sum(a.bytes for a in arrays)),
            math.ceil(n_bytes * sum(a.padded_bytes for a in arrays)),
            n,
        )
    return found


def starts_collective(computation: Computation) -> bool:
    """Whether it is the inside of a fusion that starts a collective, which others continue."""
    return _calls(computation, "AsyncCollectiveStart")


def ends_collective(computation: Computation) -> bool:
    """Whether it is the inside of the fusion that ends such a collective."""
    return _calls(computation, "AsyncCollectiveDone")


def _calls(computation: Computation, target: str) -> bool:
    return any(
        f'custom_call_target="{target}"' in i.attributes for i in computation.instructions.values()
    )


def _is_scattered(instruction: Instruction, computation: Computation, n: int) -> bool:
    """Whether an all-reduce is really a reduce-scatter, which TPUs write as the custom fusion
    "all-reduce-scatter" of an all-reduce and a dynamic-slice of the device's own shard."""
    root = computation.root
    if root.opcode != "dynamic-slice" or root.operands[0] != instruction.name:
        return False
    whole, part = next(leaves(instruction.shape)), next(leaves(root.shape))
    return whole.elements == n * part.elements


def _group_size(instruction: Instruction, module: Module) -> int:
    """Devices per group, from `replica_groups={{0,1},{2,3}}`, `=[2,2]<=[4]` or (jax 0.12)
    `=mesh['a'=2,'b'=2] {'a'}`; 2 for a permute. Raises ValueError for anything else."""
    if instruction.opcode.startswith("collective-permute"):
        return 2
    found = re.search(r"replica_groups=(.*)", instruction.attributes)
    groups = found[1] if found else "{}"
    if groups.startswith("{}"):
        return module.devices
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if iota := re.match(r"\[(\d+),(\d+)\]<=", groups):
        return int(iota[2])
    if mesh := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        # An axis, or a part of one: 'a' or 'a':(4)2, two of its devices.
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"{instruction.name}: replica_groups={groups[:80]} is not understood")


# ---- copies --------------------------------------------------------------------------------------

VMEM = 1  # the number of its memory space

# These name an existing buffer; while, conditional and call return those of the computations they
# run, whose instructions are examined themselves.
_NO_BUFFER = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "optimization-barrier",
    "partition-id",
    "replica-id",
}
# XLA gives the result of these the buffer of their first operand, and inserts a copy, which is then
# found, where that buffer is still needed.
_IN_PLACE = {"dynamic-update-slice", "scatter"}


def large_copies(
    text: str | Module, shapes: Iterable[Sequence[int]] = (), min_bytes: int | None = None
) -> list[LargeCopy]:
    """Instructions that fill a buffer as large as a table's shard.

    The instructions of the entry, loop bodies, branches and calls are examined: those inside a
    fusion or an async wrapper have no buffers. An instruction counts if an array of its result

      * has as many elements as one of `shapes` (so also transposed, reshaped or converted), or
      * is gathered from a shard: an all-gather to [>= R, dim] for a shape [R, dim], or
      * has at least `min_bytes` (values, without padding),

    and if that array is not written in place. In place are: instructions with an operand declared
    as aliased with that result (`output_to_operand_aliasing`, or `aliasing_operands` in a TPU's
    backend_config, which number results after operands); without a declaration,
    dynamic-update-slice, scatter and fusions that end in one. Parameters, tuples, bitcasts and loop
    instructions fill no buffer. Of an asynchronous pair only the start counts.

    Args:
      shapes: one device's shard of each table, dims as in the program.
    """
    module = parse_hlo(text) if isinstance(text, str) else text
    wanted = [tuple(shape) for shape in shapes]
    found = []
    for computation in module.computations.values():
        if _has_no_buffers(module, computation):
            continue
        for instruction in computation.instructions.values():
            for index, array in _written(instruction, computation):
                if not _is_large(instruction, array, wanted, min_bytes):
                    continue
                if _in_place(module, computation, instruction, index):
                    continue
                dims = ",".join(str(d) for d in array.dims)
                found.append(
                    LargeCopy(
                        instruction.name,
                        instruction.opcode,
                        f"{array.dtype}[{dims}]",
                        array.bytes,
                        instruction.op_name,
                        VMEM in (array.space, _source_space(instruction)),
                    )
                )
    return found


def _has_no_buffers(module: Module, computation: Computation) -> bool:
    """Whether a computation is inside a fusion or an async wrapper, or a reducer or comparator
    (which is not among any instruction's `called`)."""
    if computation.name == module.entry.name:
        return False
    callers = module.callers.get(computation.name, [])
    inside = {"fusion", "async-start"}
    return not callers or any(
        caller.opcode in inside or _has_no_buffers(module, where) for caller, where in callers
    )


def _written(instruction: Instruction, where: Computation) -> Iterator[tuple[int, Array]]:
    """(index among the results, array) of every buffer that the instruction fills."""
    opcode = instruction.opcode
    if opcode in _NO_BUFFER or opcode.endswith("-done"):
        return
    if opcode == "async-update":
        # A SparseCore's start may have no arrays yet: then this instruction fills them.
        start = where.instructions[instruction.operands[0]].shape
        if isinstance(start, tuple) and start[1] != ():
            return
    parts = list(instruction.shape) if isinstance(instruction.shape, tuple) else []
    if opcode == "copy-start":  # (destination, source, context)
        yield from enumerate(leaves(parts[0]))
    elif opcode.endswith(("-start", "-update")) and len(parts) > 1:  # (operands, results, ...)
        yield from enumerate(leaves(parts[1]))
    else:
        yield from enumerate(leaves(instruction.shape))


def _source_space(instruction: Instruction) -> int | None:
    """The memory space of an asynchronous copy's source."""
    if instruction.opcode != "copy-start" or not isinstance(instruction.shape, tuple):
        return None
    return next(leaves(instruction.shape[1])).space


def _is_large(
    instruction: Instruction,
    array: Array,
    shapes: list[tuple[int, ...]],
    min_bytes: int | None,
) -> bool:
    if min_bytes is not None and array.bytes >= min_bytes:
        return True
    gathers = instruction.opcode.removesuffix("-start") == "all-gather"
    return any(
        array.elements == math.prod(shape)
        or (gathers and array.dims[1:] == shape[1:] and array.dims[0] >= shape[0])
        for shape in shapes
    )


def _in_place(module: Module, where: Computation, instruction: Instruction, index: int) -> bool:
    """Whether result `index` reuses the buffer of an operand."""
    said = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    if said:
        outputs = re.findall(r"\{([\d,]*)\}: \(", said[1])
        if any(output in ("", str(index)) for output in outputs):
            return True
    config = instruction.backend_config.get("aliasing_operands")
    if config is not None:
        number = str(len(instruction.operands) + index)
        return any(number in group.get("indices", ()) for group in config.get("lists", ()))
    last = instruction
    while last.opcode == "fusion":
        where = module.computations[last.called[0]]
        last = where.root
        if last.opcode == "tuple":
            last = where.instructions[last.operands[index]]
        while last.opcode == "bitcast":
            last = where.instructions[last.operands[0]]
    return last.opcode in _IN_PLACE
