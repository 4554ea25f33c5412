"""Needle and variable tracking in the words of RULER's prompts (arXiv 2404.06654), so that a small
model can learn what `--mode=lm-eval --tasks=niah_single_1,ruler_vt` asks of it.

Documents and items are drawn here; none is RULER's. The filler is RULER's repeated sentences. How
much of it there is makes the difficulty: with a vocabulary of 2,048, documents of the easy level
have at most about 250 tokens, of the medium one 800, of the hard one 1,700.
"""

from __future__ import annotations

import itertools
import string

from engram_jax.tasks.drawing import (
    CANDIDATES,
    EASY,
    HARD,
    MEDIUM,
    Draw,
    Instance,
    for_testing,
)

# Sentences of filler at most; a training document has between none and all, an item all.
NEEDLE_FILLER = {EASY: 12, MEDIUM: 100, HARD: 220}
TRACKING_FILLER = {EASY: 3, MEDIUM: 80, HARD: 200}
HOPS = 4  # assignments of a variable to a variable, as in RULER
_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.\n",
)


def needle(draw: Draw, difficulty: str, *, testing: bool) -> Instance:
    """A number of seven digits for a key: RULER's niah_single_1."""
    key = f"{draw.word(2)}-{draw.word(2)}"
    first, *others = _numbers(draw, CANDIDATES, testing=testing)
    hidden = f"One of the special magic numbers for {key} is:{first}."
    text = _hide([hidden], draw, NEEDLE_FILLER[difficulty], testing=testing)
    prompt = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I"
        f" will quiz you about the number afterwards.\n{text}\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    return Instance(prompt, first, tuple(others))


def tracking(draw: Draw, difficulty: str, *, testing: bool) -> Instance:
    """The variables that have a value, in the order of their assignments: RULER's vt."""
    value = 10_000 + draw.below(90_000)
    names = _variables(draw, testing=testing)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {to} = VAR {from_} " for from_, to in itertools.pairwise(names)]
    text = _hide(lines, draw, TRACKING_FILLER[difficulty], testing=testing)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text"
        " above. Answer: According to the chain(s) of variable assignment in the text above,"
        f" {HOPS + 1} variables are assgined the value {value}, they are:"  # so spelt in RULER
    )
    others: dict[tuple[str, ...], None] = {}
    place = draw.below(len(names))
    while len(others) < CANDIDATES - 1:  # this variable is another one
        other = _variables(draw, testing=testing)[0]
        if other not in names:
            others[(*names[:place], other, *names[place + 1 :])] = None
    return Instance(prompt, _listed(names), tuple(map(_listed, others)))


def _hide(lines: list[str], draw: Draw, most: int, *, testing: bool) -> str:
    """The lines among sentences of filler, in their order."""
    count = most if testing else draw.below(most + 1)
    sentences = [_FILLER[i % len(_FILLER)] for i in range(count)]
    places = sorted(draw.below(count + 1) for _ in lines)
    for i, (place, line) in enumerate(zip(places, lines, strict=True)):
        sentences.insert(place + i, line)
    return " ".join(sentences)


def _numbers(draw: Draw, count: int, *, testing: bool) -> list[str]:
    """`count` different numbers: " 4831207"."""
    found: dict[str, None] = {}
    while len(found) < count:
        number = f" {1_000_000 + draw.below(9_000_000)}"
        if for_testing(number) == testing:
            found[number] = None
    return list(found)


def _variables(draw: Draw, *, testing: bool) -> list[str]:
    """HOPS + 1 different names of five capitals, all for testing or all for training."""
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        name = "".join(draw.one(string.ascii_uppercase) for _ in range(5))
        if for_testing(name) == testing:
            found[name] = None
    return list(found)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return "".join(f" {name}" for name in names)
