"""Finds the trip counts of an HLO module's loops, where the text determines them."""

from __future__ import annotations

from dataclasses import dataclass

from engram_jax.aot.hlo_parser import Computation, Instruction, Module

# Operations whose result is their operand's value.
_PASS = {"copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "optimization-barrier"}


@dataclass(frozen=True)
class _Value:
    """`constant`; or, with a `loop`, element `index` of that computation's loop state plus it."""

    constant: int
    loop: str = ""
    index: int = -1


def trip_count(module: Module, loop: Instruction, where: Computation) -> int | None:
    """How often the body of `loop`, a while in computation `where`, runs; None if unknown.

    XLA writes known_trip_count on some backends. Scheduled TPU programs lack it, so the counter is
    traced: an element of the loop state that starts at a constant, is compared with a constant (or
    with an element that never changes) and to which the body adds a constant.
    """
    known = loop.backend_config.get("known_trip_count")
    if known:
        return int(known["n"])
    evaluator = _Evaluator(module)
    body = module.computations[str(loop.attribute("body"))]
    condition = module.computations[str(loop.attribute("condition"))]
    compare, home = condition.root, condition
    while compare.opcode == "fusion":
        home = module.computations[compare.called[0]]
        compare = home.root
    if compare.opcode != "compare":
        return None
    left, right = (evaluator.value(home.instructions[o], home) for o in compare.operands)
    direction = compare.attribute("direction")
    if right and right.loop == condition.name and not evaluator.fixed(right, body):
        left, right = right, left  # from here on the counter is on the left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(str(direction), direction)
    if not left or left.loop != condition.name or not right:
        return None
    if right.loop:  # the limit is an element of the state: it must not change
        right = evaluator.initial(right, loop, where) if evaluator.fixed(right, body) else None
    start = evaluator.initial(left, loop, where)
    after = evaluator.element(body, left.index)
    if not right or right.loop or not start or start.loop or not after:
        return None
    if after.loop != body.name or after.index != left.index or after.constant == 0:
        return None
    return _count(start.constant, right.constant, after.constant, str(direction))


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
    """The number of values start, start + step, ... for which `value direction limit` holds."""
    if direction in ("LE", "GE"):
        limit += 1 if direction == "LE" else -1
    if direction == "NE" and (limit - start) % step:
        return None
    if (direction in ("LT", "LE") and step < 0) or (direction in ("GT", "GE") and step > 0):
        return None if start != limit else 0
    if direction == "EQ":
        return None
    return max(0, -((start - limit) // step) if step > 0 else -((limit - start) // -step))


class _Evaluator:
    """Follows scalars through copies, tuples, fusions and loop states."""

    def __init__(self, module: Module):
        self.module = module

    def value(self, instruction: Instruction, where: Computation, depth: int = 0) -> _Value | None:
        """The value of `instruction` in computation `where`, or None if unknown."""
        if depth > 64:
            return None
        opcode = instruction.opcode

        def operand(k: int) -> _Value | None:
            return self.value(where.instructions[instruction.operands[k]], where, depth + 1)

        if opcode == "constant":
            digits = instruction.argument.lstrip("-")
            return _Value(int(instruction.argument)) if digits.isdigit() else None
        if opcode in _PASS:
            return operand(0)
        if opcode in ("add", "subtract", "multiply"):
            return _arithmetic(opcode, operand(0), operand(1))
        if opcode == "fusion":
            called = self.module.computations[instruction.called[0]]
            return self.value(called.root, called, depth + 1)
        if opcode == "parameter":
            callers = self.module.callers.get(where.name, [])
            if len(callers) != 1 or callers[0][0].opcode not in ("fusion", "call", "async-start"):
                return None
            caller, home = callers[0]
            source = home.instructions[caller.operands[int(instruction.argument)]]
            return self.value(source, home, depth + 1)
        if opcode == "get-tuple-element":
            source = where.instructions[instruction.operands[0]]
            return self._element_of(
                source, where, int(instruction.attribute("index") or 0), depth + 1
            )
        return None

    def _element_of(
        self, source: Instruction, where: Computation, index: int, depth: int
    ) -> _Value | None:
        """Element `index` of the tuple `source`."""
        if depth > 64:
            return None
        if source.opcode == "tuple":
            return self.value(where.instructions[source.operands[index]], where, depth)
        if source.opcode == "optimization-barrier":
            inner = where.instructions[source.operands[0]]
            return self._element_of(inner, where, index, depth + 1)
        if source.opcode in ("fusion", "call"):
            called = self.module.computations[source.called[0]]
            return self._element_of(called.root, called, index, depth + 1)
        if source.opcode == "while":
            body = self.module.computations[str(source.attribute("body"))]
            inner = where.instructions[source.operands[0]]
            if self.fixed(_Value(0, body.name, index), body):
                return self._element_of(inner, where, index, depth + 1)
        if source.opcode == "parameter":
            callers = self.module.callers.get(where.name, [])
            if len(callers) == 1 and callers[0][0].opcode == "while":
                return _Value(0, where.name, index)
        return None

    def element(self, body: Computation, index: int) -> _Value | None:
        """The value of element `index` of the state after the body."""
        return self._element_of(body.root, body, index, 0)

    def fixed(self, value: _Value, body: Computation) -> bool:
        """Whether the body does not change that element of the state."""
        return self.element(body, value.index) == _Value(0, body.name, value.index)

    def initial(self, value: _Value, loop: Instruction, where: Computation) -> _Value | None:
        """The value of `value`, an element of the state of `loop`, before the first round."""
        source = where.instructions[loop.operands[0]]
        start = self._element_of(source, where, value.index, 0)
        if start and start.loop:  # an element of an outer loop's state: only if it never changes
            callers = self.module.callers[start.loop]
            outer, home = callers[0]
            body = self.module.computations[str(outer.attribute("body"))]
            if not self.fixed(start, body):
                return None
            offset, start = start.constant, self.initial(start, outer, home)
            start = _Value(start.constant + offset) if start and not start.loop else None
        return _Value(start.constant + value.constant) if start else None


def _arithmetic(opcode: str, a: _Value | None, b: _Value | None) -> _Value | None:
    if a is None or b is None:
        return None
    if opcode == "add" and not (a.loop and b.loop):
        return _Value(a.constant + b.constant, a.loop or b.loop, max(a.index, b.index))
    if opcode == "subtract" and not b.loop:
        return _Value(a.constant - b.constant, a.loop, a.index)
    if opcode == "multiply" and not a.loop and not b.loop:
        return _Value(a.constant * b.constant)
    return None
