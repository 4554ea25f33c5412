"""Entity-attribute facts of controlled frequency: "The home of Tarimo Belodu is Kamosi."

A fact of frequency f is stated exactly f times in an epoch. Names and values are made of syllables,
so that a tokenizer spells them with several tokens, which other names share.

How often a value is stated tells nothing about the answer: every value of an attribute stands in
equally many facts of each frequency, so whoever knows all values and their counts, and does not
read the name, guesses at chance.
"""

from __future__ import annotations

from engram_jax.config.errors import UserError
from engram_jax.tasks.drawing import CANDIDATES, EASY, HARD, MEDIUM, Draw, Item

ATTRIBUTES = {EASY: ("home",), MEDIUM: ("home", "trade", "friend", "song")}
ATTRIBUTES[HARD] = ATTRIBUTES[MEDIUM]
# Ways to state a fact. The hard level asks in the one way in which the fact is not stated, though
# others are.
WAYS = (
    "The {attribute} of {name} is {value}.",
    "{name} has the {attribute} {value}.",
    "Asked for the {attribute} of {name}, they say {value}.",
)
VALUES = 48  # of an attribute, at most
_LINES = 4  # statements of a document


def count_affordable(size: int, frequencies: tuple[int, ...]) -> int:
    """How many facts of each frequency can be stated in `size` bytes. Raises UserError below
    `CANDIDATES`, whose values are each other's distractors."""
    example = WAYS[0].format(attribute="home", name="Tarimo Belodu", value="Kamosi")
    count = size // ((len(example) + 1) * sum(frequencies))
    if count < CANDIDATES:
        raise UserError(
            f"config.data.tasks: {size:,} bytes for facts are enough for {count} of each frequency,"
            f" and {CANDIDATES} are needed; give more text, a larger config.data.tasks.share, or"
            f" smaller config.data.tasks.frequencies (now {frequencies})"
        )
    return count


def count_values(facts: int) -> int:
    """Over how many values to deal `facts` facts, so that the fewest are left over; of these
    numbers, the largest up to `VALUES`."""
    if facts <= VALUES:
        return facts
    return min(range(VALUES, VALUES // 2 - 1, -1), key=lambda values: facts % values)


class Facts:
    """The facts of one difficulty, about `count` of each frequency: a few less where the values of
    an attribute would not be used equally often."""

    def __init__(self, difficulty: str, seed: int, frequencies: tuple[int, ...], count: int):
        self.difficulty, self._seed = difficulty, seed
        draw = Draw(seed, "facts", difficulty)
        # With fewer facts of an attribute than candidates, values could not be used equally often.
        attributes = ATTRIBUTES[difficulty][: max(1, count // CANDIDATES)]
        facts_of = {a: len(range(j, count, len(attributes))) for j, a in enumerate(attributes)}
        self._values: dict[str, list[str]] = {}
        words: dict[str, None] = {}
        for attribute, facts in facts_of.items():
            start, wanted = len(words), count_values(facts)
            while len(words) < start + wanted:
                words[draw.word(3).capitalize()] = None
            self._values[attribute] = sorted(list(words)[start:])
        names: dict[str, None] = {}
        # (frequency, attribute, name, value, the way that is not used)
        self.facts: list[tuple[int, str, str, str, int]] = []
        for frequency in frequencies:
            dealt: dict[str, list[str]] = {}
            for attribute, values in self._values.items():
                rounds = facts_of[attribute] // len(values)
                dealt[attribute] = [
                    v for _ in range(rounds) for v in draw.some(values, len(values))
                ]
            for i in range(count):
                attribute = attributes[i % len(attributes)]
                if not dealt[attribute]:
                    continue
                while (name := draw.name()) in names:
                    pass
                names[name] = None
                unused = draw.below(len(WAYS))
                self.facts.append((frequency, attribute, name, dealt[attribute].pop(), unused))

    def documents(self) -> list[str]:
        """All statements of an epoch in random order, a few per document."""
        draw = Draw(self._seed, "facts", self.difficulty, "documents")
        stated = []
        for frequency, attribute, name, value, unused in self.facts:
            ways = (
                range(1)
                if self.difficulty != HARD
                else [w for w in range(len(WAYS)) if w != unused]
            )
            for _ in range(frequency):
                way = WAYS[draw.one(ways)]
                stated.append(way.format(attribute=attribute, name=name, value=value))
        stated = draw.some(stated, len(stated))
        return ["\n".join(stated[i : i + _LINES]) + "\n" for i in range(0, len(stated), _LINES)]

    def items(self, limit: int) -> list[Item]:
        """At most `limit` items of each frequency."""
        draw = Draw(self._seed, "facts", self.difficulty, "items")
        found: list[Item] = []
        asked: dict[int, int] = {}
        for frequency, attribute, name, value, unused in self.facts:
            asked[frequency] = asked.get(frequency, 0) + 1
            if asked[frequency] > limit:
                continue
            way = WAYS[unused if self.difficulty == HARD else 0]
            stem = way.format(attribute=attribute, name=name, value="\0").partition(" \0")[0]
            others = [v for v in self._values[attribute] if v != value]
            wrong = tuple(f" {v}" for v in draw.some(others, CANDIDATES - 1))
            found.append(Item("facts", self.difficulty, frequency, stem, f" {value}", wrong))
        return found
