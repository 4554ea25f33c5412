"""What one run of an operation of a compiled TPU program costs, in seconds, by the program's text.

matmul       fusions with a convolution or dot: libtpu's estimate of their cycles
elementwise  other fusions and copies. Lower: their bytes in HBM over its bandwidth; upper:
             libtpu's estimate, several times that for single operations; neither is the truth
unpriced     operations for which the text has no estimate (scatters, sorts, gathers on
             SparseCores, copies that change a layout): bytes over HBM's bandwidth
kernel       custom calls: bytes or FLOPs, whichever takes longer. Of grouped matrix products and
             of attention by their shapes, of others as the kernel declares them
             (`pl.CostEstimate`); bytes that it does not declare by its operands and results
collective   received bytes over the links of the torus axes that a group spans (`Links`)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from engram_jax.aot.data_movement import Collective
from engram_jax.aot.hlo_parser import Array, Computation, Instruction, Module, leaves
from engram_jax.hardware.generations import Generation

MATMUL, ELEMENTWISE, UNPRICED, KERNEL, COLLECTIVE = (
    *("matmul", "elementwise", "unpriced", "kernel", "collective"),
)
SPARSE_CORE = "SparseCore"
CUSTOM_CALL = "tpu_custom_call"
MIB = 1 << 20
SENTINEL = 1e13  # libtpu writes a larger number of cycles where it has no estimate: SparseCores
# Attention (splash or flash) of the paper's models: a head's width of queries and keys, and of
# values. In blocks of BLOCK tokens, of which a causal mask leaves the diagonal and what is below.
QK_DIM, V_DIM, BLOCK = 192, 128, 512
SHORTEST = 1024  # tokens: what is shorter is not taken for a sequence
# Outside of fusions and without an estimate, these still move their operands and results.
MOVING = frozenset(
    (
        *("sort", "gather", "scatter", "reshape", "concatenate", "transpose", "copy", "convert"),
        *("pad", "broadcast"),
    )
)


@dataclass(frozen=True)
class Links:
    """The interconnect of a slice. size: its chips along each dimension of the torus."""

    generation: Generation
    size: tuple[int, ...]

    def bandwidth(self, devices: int) -> float:
        """Bytes/s that one device of a group of so many can receive over the axes the group spans.

        A group is taken to span the fewest dimensions that hold it, largest first. Over a ring a
        chip receives from both neighbours; over a dimension that is no ring half as much, since the
        chip at its end has one neighbour. Devices of one chip share its links.
        """
        wraps = self.generation.wraps(self.size)
        chips, held, found = devices / self.generation.devices_per_chip, 1, 0.0
        for length, wrapped in sorted(zip(self.size, wraps, strict=True), reverse=True):
            if found and held >= chips:
                break
            held *= length
            found += self.generation.axis_bandwidth / (1 if wrapped else 2)
        return found / self.generation.devices_per_chip

    def seconds(self, collective: Collective) -> float:
        """Of all its runs: what it receives over the links of its group."""
        return collective.bytes / self.bandwidth(collective.group_size)


@dataclass(frozen=True)
class Price:
    """Seconds of one run. kind: see the module; name: a kernel's, or what is unpriced."""

    kind: str
    name: str
    lower: float
    upper: float


class Prices:
    """The prices of a module's operations on a slice.

    pairs: see `predict`.
    """

    def __init__(self, module: Module, links: Links, pairs: float):
        self.module, self.links, self.pairs = module, links, pairs
        self.generation = links.generation
        self.custom_calls = [
            i.name
            for c in module.computations.values()
            for i in c.instructions.values()
            if i.opcode == "custom-call"
        ]

    def of(
        self, i: Instruction, where: Computation, *, covered: bool, inside: bool
    ) -> Price | None:
        """Of an instruction of computation `where`, without what it calls; None if it costs none.

        covered: the estimate of an instruction that calls it covers it; inside: it is the inside of
        a fusion or an async wrapper, whose instructions have no buffers.
        """
        cycles = estimated_cycles(i)
        if cycles and not covered:
            return self._estimated(i, where, cycles)
        if i.opcode == "custom-call" and CUSTOM_CALL in i.attributes:
            seconds = self._kernel(i, where)
            return Price(KERNEL, short_name(i), seconds, seconds)
        if not covered and not inside:
            return self._unpriced(i, where)
        return None

    def _estimated(self, i: Instruction, where: Computation, cycles: int) -> Price:
        results, read = list(leaves(i.shape)), _operands(i, where)
        if cycles >= SENTINEL:
            seconds = self._moving(2 * _padded(results))
            return Price(UNPRICED, SPARSE_CORE, seconds, seconds)
        seconds = cycles / self.generation.clock
        if self._is_matmul(i):
            return Price(MATMUL, "", seconds, seconds)
        in_hbm = (a for arrays in (results, *read) for a in arrays if a.space == 0)
        return Price(ELEMENTWISE, "", min(seconds, self._moving(_padded(in_hbm))), seconds)

    def _unpriced(self, i: Instruction, where: Computation) -> Price | None:
        read = sorted(_padded(arrays) for arrays in _operands(i, where))
        if i.opcode == "fusion" and "scatter" in i.name and len(read) > 1:
            # The largest operand is the one that rows are added to, in place: the updates are the
            # next, and for each the old row is read and the new one written.
            seconds = self._moving(3 * read[-2])
            return Price(UNPRICED, "scatter", seconds, seconds)
        if i.opcode in MOVING:
            written = _padded(leaves(i.shape))
            if written >= MIB:
                seconds = self._moving(written + (sum(read) or written))
                return Price(UNPRICED, i.opcode, seconds, seconds)
        return None

    def _moving(self, size: float) -> float:
        """Seconds that so many bytes take through HBM."""
        return size / self.generation.hbm_bandwidth

    def _is_matmul(self, instruction: Instruction, depth: int = 0) -> bool:
        if instruction.opcode in ("convolution", "dot"):
            return True
        return (
            instruction.opcode == "fusion"
            and depth < 5
            and any(
                self._is_matmul(i, depth + 1)
                for name in instruction.called
                for i in self.module.computations[name].instructions.values()
            )
        )

    def _kernel(self, call: Instruction, where: Computation) -> float:
        """Of one run of a kernel: its bytes or its FLOPs, whichever takes longer."""
        name, arrays = short_name(call), list(leaves(call.shape))
        arrays += [a for operand in _operands(call, where) for a in operand]
        moved: float = _padded(arrays)
        if "gmm" in name or ("ragged" in name and "metadata" not in name):
            moved, flops = self._grouped_product(arrays, moved) or (moved, declared(call, "flops"))
        elif "splash" in name or "flash" in name:
            found = _queries_and_keys(arrays)
            flops = self._attention_flops(name, *found) if found else declared(call, "flops")
        else:
            flops = declared(call, "flops")
            moved = declared(call, "bytes_accessed") or moved
        return max(self._moving(moved), flops / self.generation.flops)

    def _grouped_product(self, arrays: list[Array], moved: float) -> tuple[float, float] | None:
        """(bytes, FLOPs) of a product of rows with one matrix of several; None if it is none."""
        rows = [a for a in arrays if len(a.dims) == 2 and a.dtype in ("bf16", "f32")]
        matrices = [a for a in arrays if len(a.dims) == 3 and a.dtype in ("bf16", "f32")]
        if not rows or not matrices:
            return None
        buffer = filled = float(max(a.dims[0] for a in rows))
        if self.pairs and buffer > self.pairs:
            filled = self.pairs
            moved -= sum(
                a.padded_bytes * (1 - filled / buffer) for a in rows if a.dims[0] == buffer
            )
        return moved, 2 * filled * matrices[0].dims[1] * matrices[0].dims[2]

    def _attention_flops(self, name: str, queries: Array, keys: int) -> float:
        """Of one attention kernel, causal blocks only. keys: tokens, more than of the queries where
        sequences are cut over devices, of whose blocks each computes as many."""
        *batch, length, _ = queries.dims
        backward = 3 * QK_DIM + 2 * V_DIM  # scores, dp and dq, dk; and dv
        if "dkv" in name:
            alone = not any("dq" in other for other in self.custom_calls)
            width = backward if alone else 2 * QK_DIM + 2 * V_DIM
        else:
            width = 2 * QK_DIM + V_DIM if "dq" in name else QK_DIM + V_DIM
        blocks = -(-keys // BLOCK)
        computed = (blocks + 1) / (2 * blocks)
        return 2 * math.prod(batch) * length * keys * computed * width


def estimated_cycles(instruction: Instruction) -> int:
    """libtpu's estimate, of one run; 0 without one."""
    config = instruction.backend_config
    found = config.get("window_config") if isinstance(config, dict) else None
    return int((found or {}).get("estimated_cycles") or 0)


def declared(call: Instruction, key: str) -> int:
    """What a kernel declares (`pl.CostEstimate`): "flops" or "bytes_accessed"; 0 if nothing."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"(\d+)"', call.attributes)
    return int(found[1]) if found else 0


def short_name(call: Instruction) -> str:
    """A kernel's name without the number that tells its calls apart."""
    return re.sub(r"[.\d]+$", "", call.name)


def _operands(instruction: Instruction, where: Computation) -> list[list[Array]]:
    """The arrays of each operand; a kernel's from its layout constraints, which name them all."""
    if instruction.opcode == "custom-call":
        found = re.search(
            r"operand_layout_constraints=\{(.*?)\}(?:, [a-z_]+=|$)", instruction.attributes
        )
        if found:
            return [
                [Array(m[1], tuple(int(n) for n in m[2].split(",") if n))]
                for m in re.finditer(r"(\w+)\[([\d,]*)\]", found[1])
            ]
    instructions = where.instructions
    return [
        list(leaves(instructions[name].shape))
        for name in instruction.operands
        if name in instructions
    ]


def _queries_and_keys(arrays: list[Array]) -> tuple[Array, int] | None:
    """Among an attention kernel's arrays one that is as the queries: [batch, heads, tokens, width],
    or without the batch; and the number of keys."""
    four = [
        a
        for a in arrays
        if len(a.dims) == 4 and a.dims[2] >= SHORTEST and a.dims[3] in (V_DIM, QK_DIM)
    ]
    three = [a for a in arrays if len(a.dims) == 3 and a.dims[1] >= SHORTEST]
    found = sorted(four or three, key=lambda a: a.dims[-2])
    return (found[0], found[-1].dims[-2]) if found else None


def _padded(arrays: Iterable[Array]) -> int:
    return sum(a.padded_bytes for a in arrays)
