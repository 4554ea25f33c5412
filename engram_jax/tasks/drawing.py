"""What all tasks are made of: items, draws that no version of Python changes, names and letters.

An in-context task's answers are rows of letters such as " K D W", which nearly every tokenizer
spells with one token per letter. Which rows are for testing alone is decided by a hash of the row,
so that training and test never share one, whatever is drawn. Rows to copy are in small letters, of
three lengths, and a row for training has no shorter row for testing in it; the values of the other
tasks are three capital letters.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

EASY, MEDIUM, HARD = "easy", "medium", "hard"
LETTERS = "bcdfghjklmnpqrstvwxz"
CAPITALS = LETTERS.upper()
CANDIDATES = 10  # of an item: its answer and nine distractors, so that chance is 10 %
# Lengths of rows: those to copy, in small letters, and values, in capitals.
COPIED = {EASY: 4, MEDIUM: 8, HARD: 16}
VALUE = 3
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A test item. prompt + answer is how training text would go on; distractors are other strings
    that could stand for the answer.

    frequency: how often an epoch of the training text states the answer; 0 = it is in the prompt,
      or follows from it.
    """

    task: str
    difficulty: str
    frequency: int
    prompt: str
    answer: str
    distractors: tuple[str, ...]

    @property
    def chance(self) -> float:
        """The expected accuracy of a guess among the candidates."""
        return 1 / (1 + len(self.distractors))


class Instance(NamedTuple):
    """What a document and an item are made of. others: rows that the prompt also has, or that
    resemble the answer. after: further text of a training document."""

    prompt: str
    answer: str
    others: tuple[str, ...] = ()
    after: str = ""


class Draw:
    """Random draws, a function of the parts of the seed alone.

    Only `random.Random.random` is used: Python promises that its numbers stay the same.
    """

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed))).random

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self._random() * n)

    def one(self, of: Sequence[T]) -> T:
        return of[self.below(len(of))]

    def some(self, of: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        left = list(of)
        for i in range(count):
            j = i + self.below(len(left) - i)
            left[i], left[j] = left[j], left[i]
        return left[:count]

    def word(self, syllables: int) -> str:
        """A pronounceable word, "zofaku"; most tokenizers spell it with several tokens."""
        return "".join(self.one(_CONSONANTS) + self.one(_VOWELS) for _ in range(syllables))

    def name(self) -> str:
        """A name of two words, "Tarimo Belodu"."""
        return f"{self.word(3).capitalize()} {self.word(3).capitalize()}"

    def copied(self, letters: int, *, testing: bool) -> str:
        """A row to copy, of different letters: " k d w p"; one for testing, or one without any
        row for testing in it."""
        while True:
            chosen = self.some(LETTERS, letters)
            row = spaced(chosen)
            if for_testing(row, _COPIED_SHARE) if testing else _is_for_training(chosen):
                return row

    def values(self, count: int, *, testing: bool) -> list[str]:
        """`count` different values: " K D W"."""
        found: dict[str, None] = {}
        while len(found) < count:
            value = spaced(self.some(CAPITALS, VALUE))
            if for_testing(value) == testing:
                found[value] = None
        return list(found)


def spaced(letters: Sequence[str]) -> str:
    """ " k d w"."""
    return "".join(f" {letter}" for letter in letters)


def for_testing(text: str, share: float = 0.2) -> bool:
    """Whether an answer (a row of letters, a pair of operands) is kept for testing: a share of all,
    by a hash of its characters."""
    head = hashlib.sha256(text.encode()).digest()[:4]
    return int.from_bytes(head, "big") < share * 2**32


# Small, for a row of sixteen letters has thirteen of four; there are 116,280 of these.
_COPIED_SHARE = 0.02


def _is_for_training(letters: Sequence[str]) -> bool:
    return not any(
        for_testing(spaced(letters[start : start + length]), _COPIED_SHARE)
        for length in COPIED.values()
        for start in range(len(letters) - length + 1)
    )
