"""The time of a compiled TPU step, predicted from the compiler's text: a model, not a measurement.

Needs no TPU, and reads the text of any TPU program. For one device it adds up the prices of all
operations (prices.py), as often as they run, as if they ran one after the other and nobody waited;
every branch of a conditional counts. Beside the sums it follows the schedule, in which transfers
run while the core computes (timeline.py). Use it to compare variants of a program, and compare a
difference with the gap between the lower and the upper sum before believing it.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

from engram_jax.aot import prices
from engram_jax.aot.data_movement import Collective, collectives_by_name, collectives_in
from engram_jax.aot.hlo_parser import Computation, Instruction, Module, leaves, parse_hlo
from engram_jax.aot.prices import Links, Price, Prices
from engram_jax.aot.schedule import Schedule
from engram_jax.aot.source_lines import SourceLines
from engram_jax.aot.timeline import Timeline
from engram_jax.aot.topology import parse_topology
from engram_jax.aot.trip_counts import trip_count

Sums = collections.defaultdict[Any, float]  # seconds or bytes, by what they are of


@dataclass(frozen=True)
class Assumptions:
    """What the text does not say.

    unknown: how often a loop runs whose trip count depends on data.
    overflow: the same for those of them that communicate; None: `unknown`. In this project they are
      the rounds of the row exchange beyond the first (memory/exchange.py), and run 0 times unless a
      device wants more rows of another than planned.
    pairs: (token, expert) pairs of a device per grouped matrix product, where its buffer is larger,
      sized for the worst case; 0: the buffer is full.
    """

    unknown: float = 1.5
    overflow: float | None = None
    pairs: float = 0

    def rounds(self, communicates: bool) -> float:
        return self.unknown if self.overflow is None or not communicates else self.overflow


@dataclass(frozen=True)
class Place:
    """kind, name: as of a Price (a collective's name: "all-gather/128"). phase: "fwd", "bwd",
    "remat" or "rest". lines: SourceLines.of. shape: of the first result."""

    kind: str
    name: str
    phase: str
    op_name: str
    shape: str
    lines: tuple[str, ...]


@dataclass
class Spent:
    """Seconds of all runs; runs: how many there are."""

    lower: float = 0.0
    upper: float = 0.0
    runs: float = 0.0


@dataclass(frozen=True)
class OpenLoop:
    """A loop whose trip count the text does not give, and the rounds that are assumed."""

    op_name: str
    lines: tuple[str, ...]
    communicates: bool
    rounds: float


def predict(
    text: str,
    slice_name: str,
    *,
    tokens: float = 0,
    unknown: float = 1.5,
    overflow: float | None = None,
    pairs: float = 0,
) -> dict[str, Any]:
    """Seconds of one step by what they are spent on, not rounded (`Step.summary`).

    Args:
      text: the module `after_codegen` (compiling.py: STAGES).
      slice_name: what it was compiled for, "v5p:4x4x8".
      tokens: of one device and step, for the microseconds per token; 0: without them.
      unknown, overflow, pairs: see `Assumptions`.
    """
    return examine(text, slice_name, Assumptions(unknown, overflow, pairs)).summary(tokens)


def examine(text: str, slice_name: str, assumptions: Assumptions | None = None) -> Step:
    """The same, with the places that the seconds are spent at."""
    links = Links(*parse_topology(slice_name))
    return Step(parse_hlo(text), links, assumptions or Assumptions(), SourceLines(text))


@dataclass
class Step:
    """A compiled step, and what running it costs.

    places: by Place, all of the seconds. wire: received bytes by (kind, devices of a group).
    timeline: of the entry. open_loops: by the while's name.
    """

    module: Module
    links: Links
    assumptions: Assumptions
    source: SourceLines
    places: dict[Place, Spent] = field(default_factory=dict)
    wire: Sums = field(default_factory=lambda: Sums(float))
    open_loops: dict[str, OpenLoop] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prices = Prices(self.module, self.links, self.assumptions.pairs)
        self._schedule = Schedule(self.module, self.links)
        self._known: dict[tuple[str, str], Place] = {}
        self.timeline = self._walk(self.module.entry, 1)

    def _walk(
        self, computation: Computation, count: float, *, covered: bool = False, inside: bool = False
    ) -> Timeline:
        """Add up a computation that runs `count` times, and those it calls; one run's timeline.

        covered, inside: see `Prices.of`.
        """
        timeline, received = Timeline(), collectives_by_name(self.module, computation)
        for i in computation.instructions.values():
            price = self._prices.of(i, computation, covered=covered, inside=inside)
            if price:
                self._add(i, price, count)
            collective = received.get(i.name)
            if collective:
                self._receive(i, collective, count)
            within = covered or prices.estimated_cycles(i) > 0
            enters = inside or i.opcode in ("fusion", "async-start", "custom-call")
            trips = self._trips(i, computation) if i.opcode == "while" else 1
            inner = [
                self._walk(
                    self.module.computations[name], count * trips, covered=within, inside=enters
                )
                for name in i.called
            ]
            self._schedule.put(timeline, computation, i, price, collective, inner, trips)
        timeline.finish()
        return timeline

    def _add(self, i: Instruction, price: Price, count: float) -> None:
        place = self._place(i, price.kind, price.name)
        spent = self.places.setdefault(place, Spent())
        spent.lower += price.lower * count
        spent.upper += price.upper * count
        spent.runs += count

    def _receive(self, i: Instruction, collective: Collective, count: float) -> None:
        group = collective.kind, collective.group_size
        self.wire[group] += collective.bytes * count
        seconds = self.links.seconds(collective)
        name = f"{collective.kind}/{collective.group_size}"
        self._add(i, Price(prices.COLLECTIVE, name, seconds, seconds), count)

    def _place(self, i: Instruction, kind: str, name: str) -> Place:
        if (i.name, kind) not in self._known:  # many computations are called from several places
            results = list(leaves(i.shape))
            shape = f"{results[0].dtype}{list(results[0].dims)}" if results else ""
            origin = i.op_name or i.name
            found = Place(kind, name, _phase(origin), origin, shape, self.source.of(i))
            self._known[i.name, kind] = found
        return self._known[i.name, kind]

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
        communicates = self._communicates(self.module.computations[str(loop.attribute("body"))])
        rounds = self.assumptions.rounds(communicates)
        origin, lines = loop.op_name or loop.name, self.source.of(loop)
        self.open_loops[loop.name] = OpenLoop(origin, lines, communicates, rounds)
        return rounds

    def _communicates(self, computation: Computation) -> bool:
        return any(collectives_in(self.module, computation)) or any(
            self._communicates(self.module.computations[name])
            for i in computation.instructions.values()
            for name in i.called
        )

    def sums(self, kind: str, *by: str) -> Sums:
        """Upper seconds of one kind of price, by fields of Place."""
        found = Sums(float)
        for place, spent in self.places.items():
            if place.kind == kind:
                found[" ".join(getattr(place, name) for name in by)] += spent.upper
        return found

    def summary(self, tokens: float = 0) -> dict[str, Any]:
        """The prediction as a JSON-ready dict; seconds and GB are not rounded."""
        kernels, unpriced = (self.sums(k, "name") for k in (prices.KERNEL, prices.UNPRICED))
        lower, upper = self.seconds()
        phases = {
            f"{kind} {phase}": seconds
            for kind in (prices.ELEMENTWISE, prices.MATMUL)
            for phase, seconds in sorted(self.sums(kind, "phase").items())
        }
        fused = [spent for p, spent in self.places.items() if p.kind == prices.ELEMENTWISE]
        return {
            "matmul_s": sum(self.sums(prices.MATMUL, "phase").values()),
            "elementwise_lower_s": sum(spent.lower for spent in fused),
            "elementwise_upper_s": sum(spent.upper for spent in fused),
            "kernels_s": sum(kernels.values()),
            "unpriced_s": sum(unpriced.values()),
            "collectives_s": sum(self.sums(prices.COLLECTIVE, "name").values()),
            "sum_s": lower,
            "sum_upper_s": upper,
            "us_per_token": [s / tokens * 1e6 for s in (lower, upper)] if tokens else None,
            "by_phase_upper_s": phases,
            "kernels": dict(largest(kernels, 12)),
            "unpriced": dict(largest(unpriced, 6)),
            "collectives_GB": {
                f"{kind}/{devices}": v / 1e9 for (kind, devices), v in largest(self.wire, 10)
            },
            "collectives_total_GB": sum(self.wire.values()) / 1e9,
        }

    def seconds(self) -> tuple[float, float]:
        """The lower and the upper sum."""
        spent = self.places.values()
        return sum(s.lower for s in spent), sum(s.upper for s in spent)


def _phase(name: str) -> str:
    """Forward, backward, computed again for it, or neither, by what JAX calls the operation."""
    if "remat" in name:
        return "remat"
    if "transpose(jvp" in name:
        return "bwd"
    return "fwd" if "jvp" in name else "rest"


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
