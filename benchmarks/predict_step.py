"""The time of a compiled TPU step, predicted from the compiler's text: a model, not a measurement.

    python launch.py --config=configs/engram27b.py --mode=compile --topology=v5p:4x4x8 \\
        --dump_hlo=FOLDER
    python -m benchmarks.predict_step FOLDER/engram27b_train_v5p_4x4x8.after_codegen.txt \\
        --slice v5p:4x4x8 --tokens 40960

Needs no TPU, and reads the text of any TPU program, MaxText's too. What is counted, for one device:

  matmul       fusions with a convolution or dot: libtpu's estimate of their cycles
  elementwise  other fusions and copies. Lower: their bytes in HBM over its bandwidth; upper:
               libtpu's estimate, several times that for single operations; neither is the truth
  unpriced     operations for which the text has no estimate (scatters, sorts, gathers on
               SparseCores, copies that change a layout): bytes over HBM's bandwidth
  kernels      custom calls: bytes or FLOPs, whichever takes longer. FLOPs of grouped matrix
               products and of attention by their shapes, of others as the kernel declares them
  collectives  received bytes over the links of the torus axes that a group spans (`Links`)

The sum is of all of them, one after the other, as if nothing overlapped and nobody waited. Every
branch of a conditional counts. Use it to compare variants of a program, and compare a difference
with the gap between the lower and the upper sum before believing it.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_jax.aot.data_movement import collectives_in
from engram_jax.aot.hlo_parser import Array, Computation, Instruction, Module, leaves, parse_hlo
from engram_jax.aot.topology import parse_topology
from engram_jax.aot.trip_counts import trip_count
from engram_jax.config.errors import UserError
from engram_jax.hardware.generations import Generation

MIB = 1 << 20
SENTINEL = 1e13  # libtpu writes a larger number of cycles where it has no estimate: SparseCores
KERNEL = "tpu_custom_call"
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
Sums = collections.defaultdict[Any, float]  # seconds or bytes, by what they are of


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


def predict(
    text: str,
    slice_name: str,
    *,
    tokens: float = 0,
    unknown: float = 1.5,
    overflow: float | None = None,
    pairs: float = 0,
) -> dict[str, Any]:
    """Seconds of one step by what they are spent on (see the module's docstring), not rounded.

    Args:
      text: the module `after_codegen` (aot/compiling.py: STAGES).
      slice_name: what it was compiled for, "v5p:4x4x8".
      tokens: of one device and step, for the microseconds per token; 0: without them.
      unknown: how often a loop runs whose trip count depends on data.
      overflow: the same for those of them that communicate; default: `unknown`. In this project
        they are the rounds of the row exchange beyond the first (memory/exchange.py), and run 0
        times unless a device wants more rows of another than planned.
      pairs: (token, expert) pairs of a device per grouped matrix product, where its buffer is
        larger, sized for the worst case; 0: the buffer is full.
    """
    step = examine(text, slice_name, unknown=unknown, overflow=overflow, pairs=pairs)
    return step.summary(tokens)


def examine(
    text: str,
    slice_name: str,
    *,
    unknown: float = 1.5,
    overflow: float | None = None,
    pairs: float = 0,
) -> Step:
    """The same, with the places that the seconds are spent at."""
    links = Links(*parse_topology(slice_name))
    step = Step(parse_hlo(text), links, unknown, unknown if overflow is None else overflow, pairs)
    step.walk(step.module.entry, 1)
    return step


class Step:
    """A compiled step, and what running it costs.

    lower, upper: seconds of fusions by (matmul or elementwise, phase).
    places: the upper ones by (matmul or elementwise, phase, origin, shape).
    kernels, unpriced: seconds by name. wire: received bytes by (kind, devices of a group).
    """

    def __init__(self, module: Module, links: Links, unknown: float, overflow: float, pairs: float):
        self.module, self.links = module, links
        self.unknown, self.overflow, self.pairs = unknown, overflow, pairs
        self.generation = links.generation
        self.lower: Sums = Sums(float)
        self.upper: Sums = Sums(float)
        self.places: Sums = Sums(float)
        self.kernels: Sums = Sums(float)
        self.unpriced: Sums = Sums(float)
        self.wire: Sums = Sums(float)
        self.custom_calls = [
            i.name
            for c in module.computations.values()
            for i in c.instructions.values()
            if i.opcode == "custom-call"
        ]

    def walk(
        self, computation: Computation, count: float, *, priced: bool = False, inside: bool = False
    ) -> None:
        """Add up a computation that runs `count` times, and those it calls.

        priced: an estimate of the instruction that calls it covers it; inside: it is the inside of
        a fusion or an async wrapper, whose instructions have no buffers.
        """
        for c in collectives_in(self.module, computation):
            self.wire[c.kind, c.group_size] += c.bytes * count
        for i in computation.instructions.values():
            cycles, within = _estimated_cycles(i), priced
            if cycles and not priced:
                within = True
                self._add_estimated(i, computation, cycles, count)
            elif i.opcode == "custom-call" and KERNEL in i.attributes:
                self.kernels[_short(i)] += self._kernel_seconds(i, computation) * count
            elif not priced and not inside:
                self._add_unpriced(i, computation, count)
            rounds = count * self._trips(i, computation) if i.opcode == "while" else count
            enters = inside or i.opcode in ("fusion", "async-start", "custom-call")
            for name in i.called:
                self.walk(self.module.computations[name], rounds, priced=within, inside=enters)

    def summary(self, tokens: float = 0) -> dict[str, Any]:
        """The prediction as a JSON-ready dict; seconds and GB are not rounded."""
        wire = {k: v / self.links.bandwidth(k[1]) for k, v in self.wire.items()}
        rest = sum(self.kernels.values()) + sum(self.unpriced.values()) + sum(wire.values())
        lower, upper = (sum(fused.values()) + rest for fused in (self.lower, self.upper))
        return {
            "matmul_s": _of_kind(self.upper, "matmul"),
            "elementwise_lower_s": _of_kind(self.lower, "elementwise"),
            "elementwise_upper_s": _of_kind(self.upper, "elementwise"),
            "kernels_s": sum(self.kernels.values()),
            "unpriced_s": sum(self.unpriced.values()),
            "collectives_s": sum(wire.values()),
            "sum_s": lower,
            "sum_upper_s": upper,
            "us_per_token": [s / tokens * 1e6 for s in (lower, upper)] if tokens else None,
            "by_phase_upper_s": {" ".join(k): v for k, v in sorted(self.upper.items())},
            "kernels": dict(largest(self.kernels, 12)),
            "unpriced": dict(largest(self.unpriced, 6)),
            "collectives_GB": {
                f"{kind}/{devices}": v / 1e9 for (kind, devices), v in largest(self.wire, 10)
            },
            "collectives_total_GB": sum(self.wire.values()) / 1e9,
        }

    def _add_estimated(self, i: Instruction, where: Computation, cycles: int, count: float) -> None:
        results, read = list(leaves(i.shape)), _operands(i, where)
        if cycles >= SENTINEL:
            written = sum(a.padded_bytes for a in results)
            self.unpriced["SparseCore"] += self._moving(2 * written) * count
            return
        kind = "matmul" if self._is_matmul(i) else "elementwise"
        key = kind, _phase(i.op_name or i.name)
        seconds = cycles * count / self.generation.clock
        in_hbm = (a for arrays in (results, *read) for a in arrays if a.space == 0)
        moving = self._moving(sum(a.padded_bytes for a in in_hbm)) * count
        self.upper[key] += seconds
        self.lower[key] += seconds if kind == "matmul" else min(seconds, moving)
        shape = f"{results[0].dtype}{list(results[0].dims)}" if results else ""
        self.places[*key, (i.op_name or i.name)[-60:], shape] += seconds

    def _add_unpriced(self, i: Instruction, where: Computation, count: float) -> None:
        read = sorted(_padded(arrays) for arrays in _operands(i, where))
        if i.opcode == "fusion" and "scatter" in i.name and len(read) > 1:
            # The largest operand is the one that rows are added to, in place: the updates are the
            # next, and for each the old row is read and the new one written.
            self.unpriced["scatter"] += self._moving(3 * read[-2]) * count
        elif i.opcode in MOVING:
            written = _padded(leaves(i.shape))
            if written >= MIB:
                self.unpriced[i.opcode] += self._moving(written + (sum(read) or written)) * count

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

    def _trips(self, loop: Instruction, where: Computation) -> float:
        """How often a loop runs; if the counter cannot be traced, a constant limit is believed."""
        known = trip_count(self.module, loop, where)
        if known is not None:
            return known
        condition = self.module.computations[str(loop.attribute("condition"))]
        for name in condition.root.operands:
            limit = condition.instructions.get(name)
            if limit is not None and limit.opcode == "constant" and limit.argument.isdigit():
                return int(limit.argument)
        body = self.module.computations[str(loop.attribute("body"))]
        return self.overflow if self._communicates(body) else self.unknown

    def _communicates(self, computation: Computation) -> bool:
        return any(collectives_in(self.module, computation)) or any(
            self._communicates(self.module.computations[name])
            for i in computation.instructions.values()
            for name in i.called
        )

    def _kernel_seconds(self, call: Instruction, where: Computation) -> float:
        """Of one run of a kernel: its bytes or its FLOPs, whichever takes longer."""
        name, arrays = _short(call), list(leaves(call.shape))
        arrays += [a for operand in _operands(call, where) for a in operand]
        moved: float = _padded(arrays)
        # What the kernel declares (pl.CostEstimate).
        told = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', call.attributes)
        flops: float = int(told[1]) if told else 0
        if "gmm" in name or ("ragged" in name and "metadata" not in name):
            rows = [a for a in arrays if len(a.dims) == 2 and a.dtype in ("bf16", "f32")]
            matrices = [a for a in arrays if len(a.dims) == 3 and a.dtype in ("bf16", "f32")]
            if rows and matrices:
                buffer = filled = float(max(a.dims[0] for a in rows))
                if self.pairs and buffer > self.pairs:
                    filled = self.pairs
                    moved -= sum(
                        a.padded_bytes * (1 - filled / buffer) for a in rows if a.dims[0] == buffer
                    )
                flops = 2 * filled * matrices[0].dims[1] * matrices[0].dims[2]
        elif "splash" in name or "flash" in name:
            queries = _queries(arrays)
            if queries:
                flops = self._attention_flops(name, queries)
        return max(self._moving(moved), flops / self.generation.flops)

    def _attention_flops(self, name: str, queries: Array) -> float:
        """Of one attention kernel, causal blocks only."""
        *batch, length, _ = queries.dims
        backward = 3 * QK_DIM + 2 * V_DIM  # scores, dp and dq, dk; and dv
        if "dkv" in name:
            alone = not any("dq" in other for other in self.custom_calls)
            width = backward if alone else 2 * QK_DIM + 2 * V_DIM
        else:
            width = 2 * QK_DIM + V_DIM if "dq" in name else QK_DIM + V_DIM
        blocks = -(-length // BLOCK)
        computed = (blocks + 1) / (2 * blocks)
        return 2 * math.prod(batch) * length * length * computed * width


def _estimated_cycles(instruction: Instruction) -> int:
    config = instruction.backend_config
    found = config.get("window_config") if isinstance(config, dict) else None
    return int((found or {}).get("estimated_cycles") or 0)


def _short(call: Instruction) -> str:
    """A kernel's name without the number that tells its calls apart."""
    return re.sub(r"[.\d]+$", "", call.name)


def _phase(name: str) -> str:
    """Forward, backward, computed again for it, or neither, by what JAX calls the operation."""
    if "remat" in name:
        return "remat"
    if "transpose(jvp" in name:
        return "bwd"
    return "fwd" if "jvp" in name else "rest"


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


def _queries(arrays: list[Array]) -> Array | None:
    """The queries among an attention kernel's arrays: [batch, heads, tokens, width], or without the
    batch."""
    four = [
        a
        for a in arrays
        if len(a.dims) == 4 and a.dims[2] >= SHORTEST and a.dims[3] in (V_DIM, QK_DIM)
    ]
    three = [a for a in arrays if len(a.dims) == 3 and a.dims[1] >= SHORTEST]
    return next(iter(four + three), None)


def _padded(arrays: Iterable[Array]) -> int:
    return sum(a.padded_bytes for a in arrays)


def _of_kind(seconds: Sums, kind: str) -> float:
    return sum(v for k, v in seconds.items() if k[0] == kind)


def largest(sums: Sums, count: int) -> list[tuple[Any, float]]:
    """The largest (key, value), largest first."""
    return sorted(sums.items(), key=lambda item: -item[1])[:count]


def rounded(prediction: Any, digits: int = 6) -> Any:
    """The same with numbers of so many digits behind the point."""
    if isinstance(prediction, dict):
        return {k: rounded(v, 1 if k == "us_per_token" else digits) for k, v in prediction.items()}
    if isinstance(prediction, list):
        return [rounded(v, digits) for v in prediction]
    return round(prediction, digits) if isinstance(prediction, float) else prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.after_codegen.txt")
    parser.add_argument("--slice", required=True, help="what it was compiled for: v5p:4x4x8")
    parser.add_argument("--tokens", type=float, default=0, help="of one device and step")
    parser.add_argument(
        "--unknown", type=float, default=1.5, help="rounds of a loop whose trip count is data"
    )
    parser.add_argument(
        "--overflow", type=float, help="the same where the loop communicates; default: --unknown"
    )
    parser.add_argument(
        "--pairs", type=float, default=0, help="of tokens and experts, per grouped product"
    )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--top", type=int, default=0, help="list so many most expensive places")
    flags = parser.parse_args()
    try:
        step = examine(
            flags.file.read_text(),
            flags.slice,
            unknown=flags.unknown,
            overflow=flags.overflow,
            pairs=flags.pairs,
        )
    except (OSError, UserError, ValueError) as error:
        parser.error(str(error))
    found = rounded(step.summary(flags.tokens))
    print(json.dumps(found, indent=None if flags.json else 1))
    for place, seconds in largest(step.places, flags.top):
        print(f"{seconds * 1e3:8.1f} ms", *place)


if __name__ == "__main__":
    main()
