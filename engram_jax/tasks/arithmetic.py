"""Modular arithmetic: "mod 19 : 37 + 85 = 8".

No training document has the operands of a test item, in this order or the other: both operations
commute.
"""

from __future__ import annotations

from collections.abc import Iterator

from engram_jax.tasks.drawing import EASY, HARD, MEDIUM, Draw, Item, for_testing

# The modulus, and the operation; operands are below 100.
KINDS = {EASY: (10, "+"), MEDIUM: (19, "+"), HARD: (97, "*")}
OPERANDS = 100
_LINES = 4  # sums of a document
_MOST_CANDIDATES = 20


def documents(difficulty: str, seed: int) -> Iterator[str]:
    """Training documents, endless."""
    draw = Draw(seed, "arithmetic", difficulty, "documents")
    while True:
        sums = (_sum(draw, difficulty, testing=False) for _ in range(_LINES))
        yield "".join(f"{prompt}{answer}\n" for prompt, answer in sums)


def items(difficulty: str, seed: int) -> Iterator[Item]:
    """Test items, endless; distractors are other residues: all, or nineteen of many."""
    draw = Draw(seed, "arithmetic", difficulty, "items")
    modulus = KINDS[difficulty][0]
    while True:
        prompt, answer = _sum(draw, difficulty, testing=True)
        others = [f" {n}" for n in range(modulus) if f" {n}" != answer]
        wrong = draw.some(others, min(len(others), _MOST_CANDIDATES - 1))
        yield Item("arithmetic", difficulty, 0, prompt, answer, tuple(wrong))


def _sum(draw: Draw, difficulty: str, *, testing: bool) -> tuple[str, str]:
    """(prompt, answer) of operands that are for testing, or of others."""
    modulus, operation = KINDS[difficulty]
    while True:
        a, b = draw.below(OPERANDS), draw.below(OPERANDS)
        if for_testing(f"{min(a, b)} {operation} {max(a, b)}") == testing:
            result = a + b if operation == "+" else a * b
            return f"mod {modulus} : {a} {operation} {b} =", f" {result % modulus}"
