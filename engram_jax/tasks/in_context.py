"""Tasks whose answer is in the prompt: copying, needle, multi-query retrieval, variable tracking,
and needle and tracking in RULER's words (ruler_form.py).

An instance is (prompt, answer, the rows of letters that could be mistaken for it, what follows in
the document). Training documents have rows of letters for training, test items those for testing,
as distractors, too: that a row is new tells nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from engram_jax.tasks import ruler_form
from engram_jax.tasks.drawing import (
    CANDIDATES,
    COPIED,
    EASY,
    HARD,
    MEDIUM,
    Draw,
    Instance,
    Item,
    spaced,
)

NEEDLES = {EASY: (1, 1), MEDIUM: (2, 4), HARD: (4, 8)}  # codes, sentences around them
PAIRS = {EASY: 2, MEDIUM: 4, HARD: 8}
MOVED = 4  # letters of a row that a resembling row has in another order
CHAINS = {EASY: (1, 1), MEDIUM: (2, 2), HARD: (3, 4)}  # chains, assignments of a variable in each

_NOUNS = ("house", "river", "garden", "letter", "teacher", "window", "song", "road", "market")
_ADJECTIVES = ("old", "quiet", "small", "long", "green", "early", "simple", "heavy", "new")
_VERBS = ("was near", "looked like", "came before", "stood behind", "belonged to", "was far from")


def copying(draw: Draw, difficulty: str, *, testing: bool) -> Instance:
    """A row of letters, again. Resembling rows (medium and hard): four of its letters in another
    order, the same four in all of them, so that none stands out by being in the middle."""
    row = draw.copied(COPIED[difficulty], testing=testing)
    if difficulty == EASY:
        return Instance(f"copy{row} :", row)
    letters = row.split()
    places = draw.some(range(len(letters)), MOVED)
    others: dict[str, None] = {}
    while len(others) < CANDIDATES - 1:
        moved = list(letters)
        for to, from_ in zip(places, draw.some(places, MOVED), strict=True):
            moved[to] = letters[from_]
        if moved != letters:
            others[spaced(moved)] = None
    return Instance(f"copy{row} :", row, tuple(others))


def needle(draw: Draw, difficulty: str, *, testing: bool) -> Instance:
    """A code among sentences; others' codes are there, too (medium and hard)."""
    count, filler = NEEDLES[difficulty]
    rows = draw.values(count, testing=testing)
    names = _words(draw, 2, count)
    codes = [f"the code of {name} is{row} ." for name, row in zip(names, rows, strict=True)]
    text = draw.some([*codes, *(_sentence(draw) for _ in range(filler))], count + filler)
    asked = f"the code of {names[0]} is"
    after = f" . {asked}{rows[0]}" * 2  # training sees more answers in as many words
    return Instance(f"{' '.join(text)} {asked}", rows[0], tuple(rows[1:]), after)


def _sentence(draw: Draw) -> str:
    subject, thing = (f"the {draw.one(_ADJECTIVES)} {draw.one(_NOUNS)}" for _ in range(2))
    return f"{subject} {draw.one(_VERBS)} {thing} ."


def _words(draw: Draw, syllables: int, count: int) -> list[str]:
    """`count` different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw.word(syllables)] = None
    return list(found)


def multi_query(draw: Draw, difficulty: str, *, testing: bool) -> Instance:
    """Pairs of names and rows, of which all are asked for; an item asks for one."""
    rows = draw.values(PAIRS[difficulty], testing=testing)
    names = _words(draw, 2, len(rows))
    pairs = [f" {name}{row} ;" for name, row in zip(names, rows, strict=True)]
    order = draw.some(range(len(rows)), len(rows))
    first = order[0]
    prompt = f"pairs{''.join(pairs)} asked {names[first]}"
    after = " ;" + "".join(pairs[i] for i in order[1:]).removesuffix(" ;")
    return Instance(prompt, rows[first], tuple(rows[i] for i in order[1:]), after)


def tracking(draw: Draw, difficulty: str, *, testing: bool) -> Instance:
    """Variables that get their value from other variables: what is the value of the last one?"""
    chains, length = CHAINS[difficulty]
    rows = draw.values(chains, testing=testing)
    variables = _words(draw, 1, chains * (length + 1))
    lines: list[list[str]] = []
    for i, row in enumerate(rows):
        own = variables[i * (length + 1) : (i + 1) * (length + 1)]
        assigned = [f"{to} = {from_} ;" for from_, to in itertools.pairwise(own)]
        lines.append([f"{own[0]} ={row} ;", *assigned])
    text = []
    while any(lines):  # the chains' lines among each other, each chain's in their order
        text.append(draw.one([chain for chain in lines if chain]).pop(0))
    after = "".join(f" ; {name} is{rows[0]}" for name in reversed(variables[:length]))
    return Instance(f"{' '.join(text)} {variables[length]} is", rows[0], tuple(rows[1:]), after)


TASKS: dict[str, Callable[..., Instance]] = {
    "copying": copying,
    "needle": needle,
    "multi_query": multi_query,
    "tracking": tracking,
    "ruler_needle": ruler_form.needle,
    "ruler_tracking": ruler_form.tracking,
}
_LINES = {"copying": 4}  # instances of a document; else one


def documents(task: str, difficulty: str, seed: int) -> Iterator[str]:
    """Training documents of a task, endless."""
    draw = Draw(seed, task, difficulty, "documents")
    while True:
        lines = []
        for _ in range(_LINES.get(task, 1)):
            made = TASKS[task](draw, difficulty, testing=False)
            lines.append(f"{made.prompt}{made.answer}{made.after} .\n")
        yield "".join(lines)


def items(task: str, difficulty: str, seed: int) -> Iterator[Item]:
    """Test items of a task, endless; no answer stands in a training document."""
    draw = Draw(seed, task, difficulty, "items")
    while True:
        made = TASKS[task](draw, difficulty, testing=True)
        wrong = dict.fromkeys(made.others)
        while len(wrong) < CANDIDATES - 1:
            if task == "copying":
                other = draw.copied(COPIED[difficulty], testing=True)
            else:
                (other,) = draw.values(1, testing=True)
            if other != made.answer:
                wrong[other] = None
        distractors = tuple(wrong)[: CANDIDATES - 1]
        yield Item(task, difficulty, 0, made.prompt, made.answer, distractors)
