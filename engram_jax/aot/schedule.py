"""Puts the instructions of a scheduled HLO module on a timeline: what is asynchronous, and what
waits.

Asynchronous are `X-start` .. `X-done`, `async-start` .. `async-done` (SparseCores, and collectives
on them), and collectives that a TPU spreads over fusions: one holds AsyncCollectiveStart, another
AsyncCollectiveDone, and those between compute and continue it.
"""

from __future__ import annotations

import re

from engram_jax.aot import prices
from engram_jax.aot.data_movement import Collective, ends_collective, starts_collective
from engram_jax.aot.hlo_parser import Computation, Instruction, Module
from engram_jax.aot.prices import Links, Price
from engram_jax.aot.timeline import LINKS, SPARSE_CORES, Timeline, pair

# What an asynchronous transfer's handles pass through between its start and its done.
_CARRIES = frozenset(
    ("get-tuple-element", "tuple", "async-update", "fusion", "bitcast", "optimization-barrier")
)


class Schedule:
    """The instructions of one module on the links of a slice."""

    def __init__(self, module: Module, links: Links):
        self.module, self.links = module, links

    def put(
        self,
        timeline: Timeline,
        computation: Computation,
        i: Instruction,
        price: Price | None,
        collective: Collective | None,
        inner: list[Timeline],
        trips: float,
    ) -> None:
        """Put an instruction on the timeline of the computation that it is in."""
        called = [self.module.computations[name] for name in i.called]
        transfers = {
            LINKS: sum(t.overlaps[LINKS].busy for t in inner)
            + (self.links.seconds(collective) if collective else 0),
            SPARSE_CORES: sum(t.overlaps[SPARSE_CORES].busy for t in inner),
        }
        if price and price.name == prices.SPARSE_CORE:
            transfers[SPARSE_CORES] += price.upper
        elif price:
            timeline.compute(pair(price.lower, price.upper))
        if i.opcode.endswith("-done") or any(map(ends_collective, called)):
            started = self._started(i, computation, timeline.pending)
            if started:
                timeline.done(started)
        elif i.opcode.endswith("-start") or any(map(starts_collective, called)):
            if any(transfers.values()):
                timeline.start(i.name, transfers)
        elif i.opcode in ("while", "call", "conditional"):
            for of_called in inner:
                timeline.ran(of_called, trips)
        else:  # alone, or in a fusion: the core waits for it
            for engine, seconds in transfers.items():
                if seconds:
                    timeline.block(engine, seconds)
            for of_called in inner:
                timeline.compute(of_called.core)

    def _started(
        self, done: Instruction, where: Computation, pending: tuple[str, ...]
    ) -> str | None:
        """Which of the transfers under way a done ends: one that its operands come from. Where a
        fusion continues several of them, the chain's number tells which."""
        queue, seen, found = list(done.operands), set(), []
        while queue:
            name = queue.pop(0)
            if name in seen or name not in where.instructions:
                continue
            seen.add(name)
            source = where.instructions[name]
            if name in pending:
                found.append(source)
            elif source.opcode in _CARRIES:
                queue += source.operands
        same = [start for start in found if self._chain(start) == self._chain(done)]
        return next((start.name for start in [*same, *found]), None)

    def _chain(self, fusion: Instruction) -> str:
        """Of the collective that a fusion starts or ends; "" if it has no number."""
        for name in fusion.called:
            for i in self.module.computations[name].instructions.values():
                if number := re.search(r'chain_id="(\d+)"', i.attributes):
                    return number[1]
        return ""
