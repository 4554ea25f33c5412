"""Optimized HLO text as objects: computations, instructions, shapes. Parsing only, no judgement."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Array:
    """One array shape: dtype "f32", dims, minor_to_major and tiles of its layout (empty: unknown).

    space: memory space of the layout, 0 = HBM (1 is VMEM on a TPU, 5 the host).
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the values alone, without padding."""
        return self.elements * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """As it lies in memory: the most minor dimensions rounded up to whole tiles."""
        if not self.tiles or len(self.minor_to_major) != len(self.dims):
            return self.bytes
        minor_first = [self.dims[d] for d in self.minor_to_major]
        # Only the first tile pads; further ones, as (2,1) of bfloat16, order values within it.
        for i, tile in enumerate(reversed(self.tiles[0])):
            if i < len(minor_first):
                minor_first[i] = -(-minor_first[i] // tile) * tile
        return math.prod(minor_first) * _bits(self.dtype) // 8


def _bits(dtype: str) -> int:
    """pred and f8e4m3fn are 8 bits, token and opaque nothing."""
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


Shape = Array | tuple[Any, ...]  # a tuple's elements are Shapes again


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, in order."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`; operands by name."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    argument: str  # what stands between the parentheses: a constant's value, a parameter's number
    attributes: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """`key=%computation` or `key=word` -> the name without %."""
        found = re.search(rf"(?:^|[ ,]){key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program ("jit(step)/exchange/all_to_all"), or ""."""
        found = re.search(r'metadata=\{[^}]*?op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def backend_config(self) -> dict[str, Any]:
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        start += len("backend_config=")
        try:
            return json.JSONDecoder().raw_decode(self.attributes, start)[0]
        except json.JSONDecodeError:  # some other backend's own notation
            return {}

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run as part of this instruction, reducers and comparators aside."""
        listed = {"conditional": "branch_computations", "custom-call": "called_computations"}
        if self.opcode in listed:
            found = re.search(listed[self.opcode] + r"=\{([^}]*)\}", self.attributes)
            if found:
                return tuple(name.strip().lstrip("%") for name in found[1].split(","))
            names = [self.attribute(k) for k in ("true_computation", "false_computation")]
        elif self.opcode == "while":
            names = [self.attribute("body"), self.attribute("condition")]
        elif self.opcode == "call":
            names = [self.attribute("to_apply")]
        elif self.opcode in ("fusion", "async-start"):
            names = [self.attribute("calls")]
        else:
            names = []
        return tuple(name for name in names if name)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.argument): i for i in found}


@dataclass(frozen=True)
class Module:
    """A parsed module. devices: partitions x replicas it was compiled for."""

    header: str
    entry: Computation
    computations: dict[str, Computation]

    @property
    def devices(self) -> int:
        counts = re.findall(r"num_partitions=(\d+)|replica_count=(\d+)", self.header)
        return math.prod(int(a or b) for a, b in counts)

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[Instruction, Computation]]]:
        """Who runs a computation: (instruction, the computation it stands in)."""
        found: dict[str, list[tuple[Instruction, Computation]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for name in instruction.called:
                    found.setdefault(name, []).append((instruction, computation))
        return found


def parse(text: str) -> Module:
    """Read the text of an optimized module (`compiled.as_text()` or XLA's dump of it).

    Raises:
      ValueError: there is no module in the text.
    """
    header, computations, entry, name = "", {}, None, None
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name, lines = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%"), {}
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}") and name:
            computations[name] = Computation(name, lines)
            name = None
        elif name and " = " in line:
            instruction = parse_instruction(line)
            lines[instruction.name] = instruction
    if entry not in computations:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(header, computations[entry], computations)


def parse_instruction(line: str) -> Instruction:
    """`ROOT %name = shape opcode(operands), attributes`."""
    left, right = line.strip().split(" = ", 1)
    shape, end = _shape(right, 0)
    opcode, rest = right[end:].lstrip().split("(", 1)
    close = _closing(rest)
    argument = rest[:close]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(
        name, shape, opcode, operands, argument, rest[close + 1 :], left.startswith("ROOT ")
    )


def _closing(text: str) -> int:
    """Where the parenthesis that was open before `text` closes."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SKIP = re.compile(r"(?:/\*.*?\*/|[\s,])*")  # /*index=5*/ in long tuples


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """The shape that starts at `at`, and where it ends."""
    if text[at] != "(":
        found = _ARRAY.match(text, at)
        if not found:  # token[] and the like have brackets; a bare word has none
            end = text.index(" ", at)
            return Array(text[at:end], (0,)), end
        return _array(*found.groups()), found.end()
    parts, at = [], _SKIP.match(text, at + 1).end()  # type: ignore[union-attr]
    while text[at] != ")":
        part, at = _shape(text, at)
        parts.append(part)
        at = _SKIP.match(text, at).end()  # type: ignore[union-attr]
    return tuple(parts), at + 1


@functools.lru_cache(maxsize=4096)
def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    order, _, rest = (layout or "").partition(":")
    tiled = re.search(r"T((?:\([\d,*]+\))+)", rest)
    tiles = re.findall(r"\(([\d,]+)\)", tiled[1]) if tiled else []
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        sizes,
        tuple(int(d) for d in order.split(",") if d),
        tuple(tuple(int(n) for n in tile.split(",")) for tile in tiles),
        int(space[1]) if space else 0,
    )
