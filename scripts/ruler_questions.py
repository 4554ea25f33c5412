"""Questions about records of Debian's iso-codes and miscfiles, as SQuAD's and HotpotQA's are.

TEXT is what scripts/debian_text made: a record is a line "subject: field value, field value".
Equal text gives equal questions.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTIONS = 1_000  # RULER asks 500
RECORDS = 3  # of a paragraph: about as long as SQuAD's
# The records' files: what is asked of them.
ASKED = {
    "iso-codes/iso_3166-2": ("code", "type", "country"),
    "iso-codes/iso_639-3": ("alpha-3",),
    "miscfiles/airport": ("code", "serves"),
    "miscfiles/cities": ("population", "longitude"),
    "miscfiles/currency": ("abbreviation", "code"),
}
LABELS = {  # of the fields of all of them; one-letter values (kinds of languages) are left out
    **{name: f"{name} code" for name in ("alpha-2", "alpha-3", "numeric", "bibliographic")},
    **{name: name for name in ("code", "type", "country", "region", "parent", "abbreviation")},
    **{name: name for name in ("population", "longitude", "latitude", "elevation", "capital")},
    **{name: name for name in ("official name", "common name", "inverted name", "scope")},
    "serves": "city served",
    "UN code": "UN code",
}
Facts = dict[str, dict[str, str]]  # subject -> field -> value


def facts_of(text: Path, stem: str) -> Facts:
    """The records of the files TEXT/stem*.txt whose subject only one record has."""
    found: list[tuple[str, dict[str, str]]] = []
    for file in sorted((text / stem).parent.glob(f"{Path(stem).name}*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            subject, colon, rest = line.partition(": ")
            if colon and "(" not in subject:
                found.append((subject, dict(_fields(rest))))
    often = Counter(subject for subject, _ in found)
    return {subject: facts for subject, facts in found if often[subject] == 1}


def _fields(text: str) -> Iterator[tuple[str, str]]:
    places = [*re.finditer(rf"(?:^|, )({'|'.join(LABELS)}) ", text)]
    for place, after in zip(places, [*places[1:], None], strict=True):
        yield place[1], text[place.end() : after.start() if after else None]


def _sentences(subject: str, facts: dict[str, str]) -> list[str]:
    named = {LABELS[field]: value for field, value in facts.items() if len(value) > 1}
    return [f"The {label} of {subject} is {value}." for label, value in named.items()]


def squad_of(text: Path) -> dict[str, Any]:
    """Questions in SQuAD 2.0's format: a file is an article, some records are a paragraph."""
    draw = random.Random(0)
    articles, left = [], QUESTIONS
    for number, (stem, asked) in enumerate(ASKED.items()):
        facts = [*facts_of(text, stem).items()]
        share = -(-left // (len(ASKED) - number)) if facts else 0
        starts = range(0, len(facts), RECORDS)
        chosen = sorted(draw.sample(starts, min(share, len(starts))))
        paragraphs = []
        for start in chosen:
            group = facts[start : start + RECORDS]
            context = " ".join(s for subject, known in group for s in _sentences(subject, known))
            options = [(s, f, k[f]) for s, k in group for f in asked if len(k.get(f, "")) > 1]
            if not options:
                continue
            subject, name, value = draw.choice(options)
            question = f"What is the {LABELS[name]} of {subject}?"
            answer = {"text": value, "answer_start": context.index(f"of {subject} is {value}.")}
            answer["answer_start"] += len(f"of {subject} is ")
            asked_of = {"id": f"{stem}-{start}", "question": question, "is_impossible": False}
            paragraphs.append({"context": context, "qas": [asked_of | {"answers": [answer]}]})
        left -= len(paragraphs)
        if paragraphs:
            articles.append({"title": stem, "paragraphs": paragraphs})
    if not articles:
        sys.exit(f"error: {text}: has no records; needs some of {', '.join(ASKED)}")
    for article in articles:
        draw.shuffle(article["paragraphs"])  # RULER asks the first ones
    draw.shuffle(articles)
    return {"version": "v2.0, made from Debian's records", "data": articles}


def hotpot_of(text: Path) -> list[dict[str, Any]]:
    """Questions of two steps in HotpotQA's format, each with ten passages: a place's, which names
    its country, the country's, which has the answer, and eight others."""
    draw = random.Random(0)
    places = facts_of(text, "iso-codes/iso_3166-2")
    countries = facts_of(text, "iso-codes/iso_3166-1")
    for name, known in facts_of(text, "miscfiles/countries").items():
        if name in countries and "capital" in known:
            countries[name]["capital"] = known["capital"]
    known_of = [
        p for p, f in places.items() if f.get("country") in countries and p not in countries
    ]
    if len(known_of) < 5 or len(countries) < 5:
        sys.exit(f"error: {text}: has too few records of places; needs iso-codes")
    found = []
    for number, place in enumerate(draw.sample(known_of, min(QUESTIONS, len(known_of)))):
        country = places[place]["country"]
        fields = [f for f in ("capital", "alpha-3", "numeric") if f in countries[country]]
        asked = "capital" if "capital" in fields and draw.random() < 0.7 else draw.choice(fields)
        others = [p for p in draw.sample(known_of, 9) if p != place][:4]
        lands = [c for c in draw.sample([*countries], 5) if c != country][:4]
        passages = [[p, _spaced(_sentences(p, places[p]))] for p in (place, *others)]
        passages += [[c, _spaced(_sentences(c, countries[c]))] for c in (country, *lands)]
        draw.shuffle(passages)
        found.append(
            {
                "_id": f"{number:05}",
                "question": f"What is the {LABELS[asked]} of the country to which {place} belongs?",
                "answer": countries[country][asked],
                "type": "bridge",
                "level": "medium",
                "supporting_facts": [[place, 0], [country, 0]],
                "context": passages,
            }
        )
    return found


def _spaced(sentences: list[str]) -> list[str]:
    return [sentences[0], *(f" {sentence}" for sentence in sentences[1:])]
