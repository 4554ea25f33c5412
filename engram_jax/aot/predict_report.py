"""What `--mode=compile` says of a step's predicted time, as a dict and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engram_jax.aot import prices
from engram_jax.aot.predict import Assumptions, OpenLoop, Place, Spent, Step, largest, rounded
from engram_jax.config import Config
from engram_jax.config.errors import UserError

PARTS = ("matmul", "elementwise", "kernels", "SparseCore", "scatter and sort", "collectives")
PHASES = {"fwd": "forward", "bwd": "backward", "remat": "recomputation", "rest": "rest"}
LISTED = 10  # places
_PART_OF = {
    prices.MATMUL: "matmul",
    prices.ELEMENTWISE: "elementwise",
    prices.KERNEL: "kernels",
    prices.COLLECTIVE: "collectives",
}
_ROWS = ("scatter", "gather", "sort")  # without an estimate, like copies, which are elementwise


def expected_rounds(config: Config) -> float:
    """How often the loop over chunks of (token, expert) pairs runs, for balanced experts.

    With an expert axis of n devices (layers/moe.py: `_routed`) a device gathers the T tokens of the
    axis, which make k T pairs, and computes those of its own experts, k T / n of them in the mean,
    in chunks of T / 2: 2 k / n rounds. For k = 6: 1.5 on an axis of 8, 3 on 4, 6 on 2. A real step
    rounds this up to whole chunks. Products cost only the pairs that are there, so the mean is
    right for them; for the other operations of a chunk that is not full it is too little. Without
    an expert axis there is no such loop.
    """
    n, ffn = config.mesh.expert, config.model.ffn
    return 2 * ffn.top_k / n if n > 1 and ffn.routed_experts else 1.0


def assumed_of(
    config: Config, unknown: float | None = None, overflow: float = 0, pairs: float = 0
) -> Assumptions:
    """Of this project's programs: `expected_rounds`, and by the plan no round of the row exchange
    beyond the first, unless others are given.

    Raises:
      UserError: one that is no number from 0 on.
    """
    for name, value in (("unknown", unknown), ("overflow", overflow), ("pairs", pairs)):
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name}={value}: must be a number from 0 on")
    return Assumptions(expected_rounds(config) if unknown is None else unknown, overflow, pairs)


@dataclass(frozen=True)
class Work:
    """A program's step, of all devices: tokens, and the model's FLOPs; 0: not told."""

    assumptions: Assumptions
    tokens: float = 0
    flops: float = 0


def predicted(
    step: Step, tokens: float = 0, flops: float = 0, places: int = LISTED
) -> dict[str, Any]:
    """The prediction as a JSON-ready dict.

    Args:
      step: examined.
      tokens: of all devices in a step; 0: without tokens per second.
      flops: of the model, of all devices in a step, recomputation not counted; 0: without
        utilisation.
      places: how many of the costliest are listed.

    Returns:
      Pairs are [lower, upper] of the prices. seconds; by_part, by_phase: of PARTS and PHASES;
      tokens_per_s: [at the upper seconds, at the lower]; utilisation, likewise, of the devices'
      peak; overlap: {engine: {busy_s, started_s, between_s, exposed_s}}, see `timeline.Overlap`
      (exposed: what the core waits); places: {part, phase, name, lines, shape, seconds, runs};
      open_loops: the loops whose trip count is data, with the rounds that were assumed; assumed:
      the assumptions; collectives_GB, received_GB; kernels: seconds by name.
    """
    lower, upper = step.seconds()
    rates = [1 / s for s in (upper, lower)] if lower else []
    generation = step.links.generation
    peak = math.prod(step.links.size) * generation.devices_per_chip * generation.flops
    found = {
        "seconds": [lower, upper],
        "by_part": _by(step, PARTS, _part),
        "by_phase": _by(step, tuple(PHASES.values()), lambda place: PHASES[place.phase]),
        "tokens_per_s": [tokens * r for r in rates] if tokens else None,
        "utilisation": [flops * r / peak for r in rates] if flops else None,
        "overlap": {
            engine: {
                "busy_s": overlap.busy,
                "started_s": overlap.started,
                "between_s": [float(s) for s in overlap.between],
                "exposed_s": [float(s) for s in overlap.waits],
            }
            for engine, overlap in step.timeline.overlaps.items()
        },
        "places": _costliest(step, places),
        "open_loops": [_loop(loop) for loop in step.open_loops.values()],
        "assumed": {
            "unknown": step.assumptions.unknown,
            "overflow": step.assumptions.rounds(communicates=True),
            "pairs": step.assumptions.pairs,
        },
        "kernels": dict(largest(step.sums(prices.KERNEL, "name"), 12)),
        "collectives_GB": {f"{k}/{n}": v / 1e9 for (k, n), v in largest(step.wire, 10)},
        "received_GB": sum(step.wire.values()) / 1e9,
    }
    return rounded(found)


def together(parts: list[dict[str, Any]], tokens: float) -> dict[str, Any]:
    """Of programs that run one after the other, each once: their seconds and rates."""
    seconds = [sum(part["seconds"][k] for part in parts) for k in (0, 1)]
    rates = [tokens / s for s in reversed(seconds)] if seconds[0] else None
    return rounded({"seconds": seconds, "tokens_per_s": rates})


def _part(place: Place) -> str:
    if place.kind == prices.UNPRICED:
        if place.name == prices.SPARSE_CORE:
            return "SparseCore"
        return "scatter and sort" if place.name in _ROWS else "elementwise"
    return _PART_OF[place.kind]


def _by(step: Step, names: tuple[str, ...], name_of: Any) -> dict[str, list[float]]:
    found = {name: [0.0, 0.0] for name in names}
    for place, spent in step.places.items():
        sums = found[name_of(place)]
        sums[0] += spent.lower
        sums[1] += spent.upper
    return found


def _costliest(step: Step, count: int) -> list[dict[str, Any]]:
    """By the upper seconds; operations of one part and phase at the same lines are one place."""
    found: dict[tuple[Any, ...], tuple[Place, Spent, float]] = {}
    for place, spent in step.places.items():
        key = _part(place), place.phase, place.lines or place.op_name
        first, total, most = found.setdefault(key, (place, Spent(), 0.0))
        total.lower += spent.lower
        total.upper += spent.upper
        total.runs += spent.runs
        if spent.upper > most:  # the shape and name of the largest stand for all
            first, most = place, spent.upper
        found[key] = first, total, most
    return [
        {
            "part": _part(place),
            "phase": PHASES[place.phase],
            "name": place.op_name[-60:],
            "lines": list(place.lines),
            "shape": place.shape,
            "seconds": [spent.lower, spent.upper],
            "runs": spent.runs,
        }
        for place, spent, _ in sorted(found.values(), key=lambda f: -f[1].upper)[:count]
    ]


def _loop(loop: OpenLoop) -> dict[str, Any]:
    return {
        "name": loop.op_name[-60:],
        "lines": list(loop.lines),
        "communicates": loop.communicates,
        "rounds": loop.rounds,
    }


# ---- for a terminal ------------------------------------------------------------------------------


def _range(values: list[float], form: str = ".3g", factor: float = 1) -> str:
    low, high = (format(v * factor, form) for v in values)
    return low if low == high else f"{low} .. {high}"


def headline(found: dict[str, Any]) -> str:
    """One line: seconds, tokens per second, utilisation."""
    line = f"predicted {_range(found['seconds'])} s"
    if found.get("tokens_per_s"):
        line += f", {_range(found['tokens_per_s'], ',.0f')} tokens/s"
    if found.get("utilisation"):
        line += f", utilisation {_range(found['utilisation'], '.1f', 100)} %"
    return line


def as_table(found: dict[str, Any]) -> str:
    """`predicted` or `together` as text for a terminal."""
    lines = [f"{headline(found)} (a model, not a measurement)"]
    if "by_part" not in found:
        return lines[0]
    for title, key in (("by part", "by_part"), ("by phase", "by_phase")):
        told = ", ".join(f"{k} {_range(v)}" for k, v in found[key].items() if v[1])
        lines.append(f"  {title:<14} {told}")
    for engine, overlap in found["overlap"].items():
        if overlap["busy_s"]:
            lines.append(
                f"  {engine:<14} {overlap['busy_s']:.3g} s, {overlap['started_s']:.3g} of it"
                f" asynchronous, {_range(overlap['between_s'])} s of computing between start and"
                f" done; exposed {_range(overlap['exposed_s'])} s"
            )
    loops = {(tuple(p["lines"]) or (p["name"],), p["rounds"]) for p in found["open_loops"]}
    for where, rounds in sorted(loops):
        lines.append(f"  {rounds:g} rounds assumed  of the loop at {' < '.join(where)}")
    if found["places"]:
        lines.append("  costliest, ms")
    for place in found["places"]:
        lines.append(
            f"  {_range(place['seconds'], '.3g', 1e3):>20}  {place['part']}, {place['phase']}:"
            f" {' < '.join(place['lines']) or '-'}  {place['name'].rpartition('/')[2]}"
            f" {place['shape']}"
        )
    return "\n".join(lines)
