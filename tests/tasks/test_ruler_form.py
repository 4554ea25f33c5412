"""Needle and tracking in RULER's words: answers by a plain program, filler as told."""

from __future__ import annotations

import itertools
import re

import pytest

from engram_jax.config import DIFFICULTIES
from engram_jax.tasks import in_context, ruler_form
from engram_jax.tasks.mixture import Unseen

SENTENCES = r"(The grass is green|The sky is blue|The sun is yellow|Here we go|There and back)"


def drawn(task, difficulty, count=30, seed=3):
    return list(itertools.islice(in_context.items(task, difficulty, seed), count))


def documents(task, difficulty, count=200, seed=3):
    return list(itertools.islice(in_context.documents(task, difficulty, seed), count))


def found_number(text):
    (key,) = re.findall(r"What is the special magic number for (\S+) mentioned", text)
    (number,) = re.findall(rf"magic numbers for {key} is: (\d{{7}})\.", text)
    return f" {number}"


def found_variables(text):
    """By an interpreter: assignments in the order of the text."""
    (value,) = re.findall(r"assigned the value (\d{5}) in the text above", text)
    values: dict[str, str] = {}
    for name, number, other in re.findall(r"VAR ([A-Z]{5}) = (?:(\d{5})|VAR ([A-Z]{5}))", text):
        values[name] = number or values[other]
    return "".join(f" {name}" for name, held in values.items() if held == value)


FOUND = {"ruler_needle": found_number, "ruler_tracking": found_variables}
FILLER = {
    "ruler_needle": ruler_form.NEEDLE_FILLER,
    "ruler_tracking": ruler_form.TRACKING_FILLER,
}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("task", FOUND)
def test_answers_are_what_a_plain_program_finds(task, difficulty):
    for item in drawn(task, difficulty):
        assert FOUND[task](item.prompt) == item.answer
        assert len(re.findall(SENTENCES, item.prompt)) == FILLER[task][difficulty]
        assert len(item.distractors) == 9 and item.answer not in item.distractors
        assert not item.prompt.endswith(" ")


@pytest.mark.parametrize("task", FOUND)
def test_documents_end_with_the_answer_and_have_any_amount_of_filler(task):
    counts = set()
    for text in documents(task, "easy"):
        assert text.endswith(f"{FOUND[task](text)} .\n")
        counts.add(len(re.findall(SENTENCES, text)))
    assert counts == set(range(FILLER[task]["easy"] + 1))


def test_the_needle_lies_anywhere():
    places = set()
    for item in drawn("ruler_needle", "easy", 300):
        before = item.prompt.split("One of the special")[0]
        places.add(len(re.findall(SENTENCES, before)))
    assert places == set(range(13))


@pytest.mark.parametrize(
    "text", ["its number is {}.", "{}", "({})", "a = {}\n", "the list{} and so on"]
)
@pytest.mark.parametrize("task", FOUND)
def test_an_answer_in_the_text_is_no_test(task, text):
    items = drawn(task, "easy", 3)
    unseen = Unseen(items)
    answer = items[1].answer
    unseen.read(text.format(answer if "list" in text else answer.strip()))
    assert unseen.keep(10) == [items[0], items[2]]


def test_part_of_a_longer_number_is_not_the_answer():
    items = drawn("ruler_needle", "easy", 2)
    unseen = Unseen(items)
    unseen.read(f"1{items[0].answer.strip()} and {items[1].answer.strip()}0")
    assert unseen.keep(10) == items
