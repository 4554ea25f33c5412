"""The questions that stand in for SQuAD and HotpotQA, and the folder's own account of itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from scripts import ruler_data
from scripts.ruler_questions import facts_of, hotpot_of, squad_of

NAMES = [f"{a}{b}{c}" for a, b, c in itertools.product("BDFGKLMN", ["ar", "el", "os"], "aeiou")]


def debian_text(folder: Path) -> Path:
    """A small text as scripts/debian_text writes it."""
    lands, places = NAMES[:20], NAMES[20:110]
    records = {
        "iso-codes/iso_3166-1-0001.txt": [
            f"{land}: alpha-2 {land[:2].upper()}, alpha-3 {land[:3].upper()}, numeric {100 + n}"
            for n, land in enumerate(lands)
        ],
        "iso-codes/iso_3166-2-0001.txt": [
            f"{place}: code X-{n}, type Province, country {lands[n % 20]}"
            for n, place in enumerate(places)
        ],
        "miscfiles/countries-0001.txt": [
            f"{land}: UN code {100 + n}, capital {land} City" for n, land in enumerate(lands[:15])
        ],
    }
    prose = [
        f"{n} In {name} there was a river, and Mr. {name} saw it. He went."
        for n, name in enumerate(NAMES)
    ]
    records[f"{ruler_data.PROSE[0]}/a.txt"] = ["A title", *prose * 25]
    for name, lines in records.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return debian_text(tmp_path_factory.mktemp("text"))


def test_questions_of_one_passage(text):
    """What is asked of a record is its field, and the passage says it where the answer points."""
    facts = facts_of(text, "iso-codes/iso_3166-2")
    asked = [(p, q) for a in squad_of(text)["data"] for p in a["paragraphs"] for q in p["qas"]]
    assert len(asked) == 30  # three records each
    for paragraph, question in asked:
        (answer,) = question["answers"]
        field, _, subject = question["question"][len("What is the ") : -1].partition(" of ")
        assert facts[subject][field] == answer["text"]
        assert paragraph["context"][answer["answer_start"] :].startswith(f"{answer['text']}.")
        assert f"The {field} of {subject} is {answer['text']}." in paragraph["context"]


def test_questions_of_two_passages(text):
    places = facts_of(text, "iso-codes/iso_3166-2")
    questions = hotpot_of(text)
    assert len(questions) == 90
    for asked in questions:
        place = asked["question"].rsplit(" which ", 1)[1].removesuffix(" belongs?")
        country = places[place]["country"]
        passages = {title: "".join(sentences) for title, sentences in asked["context"]}
        assert len(passages) == 10
        assert f"The country of {place} is {country}." in passages[place]
        assert f"of {country} is {asked['answer']}." in passages[country]
        assert {title for title, _ in asked["supporting_facts"]} == {place, country}


def test_ambiguous_subjects_are_not_asked_about(tmp_path):
    lines = ["Aa: code 12, type Town", "Aa: code 13, type Town", "Bb: code 14, type City, Old"]
    (tmp_path / "iso-codes").mkdir()
    (tmp_path / "iso-codes" / "iso_3166-2-0001.txt").write_text("\n".join(lines))
    found = facts_of(tmp_path, "iso-codes/iso_3166-2")
    assert found == {"Bb": {"code": "14", "type": "City, Old"}}


def test_the_folder_says_what_it_is(text, tmp_path):
    punkt = tmp_path / "given" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    (punkt / "abbrev_types.txt").write_text("mr")
    squad = tmp_path / "squad.json"
    squad.write_text("{}")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ruler_data.fill(text, tmp_path / name, squad=squad, punkt=punkt.parent)
    one, two = (tmp_path / name for name in ("one", "two"))
    parts = json.loads((one / "manifest.json").read_text())["parts"]
    assert {name: about["original"] for name, about in parts.items()} == {
        "essays": False,
        ruler_data.SQUAD: None,
        ruler_data.HOTPOT: False,
        "nltk_data": None,
    }
    assert "not HotpotQA" in (one / "README.md").read_text()
    assert (one / "nltk_data/tokenizers/punkt_tab/english/abbrev_types.txt").read_text() == "mr"
    essay = next((one / "essays").iterdir()).read_text()
    assert essay.startswith("In ") and "A title" not in essay
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()
