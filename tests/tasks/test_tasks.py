"""Synthetic tasks: answers that are right, that training never states, and chances as told."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from engram_jax.config import DIFFICULTIES, TASKS, TasksConfig
from engram_jax.config.errors import UserError
from engram_jax.tasks import arithmetic, facts, in_context
from engram_jax.tasks.drawing import COPIED, Draw, for_testing, spaced
from engram_jax.tasks.mixture import Mixture, Unseen, interleave

LEVELS = [(t, d) for t in in_context.TASKS for d in DIFFICULTIES]
SEED = 3
TEXT = 800_000  # bytes beside which the mixture is made


def some(endless, count):
    return list(itertools.islice(endless, count))


@pytest.fixture(scope="module")
def mixture():
    config = TasksConfig(
        names=TASKS, difficulties=DIFFICULTIES, frequencies=(1, 4), test_items=25, seed=SEED
    )
    return Mixture(config, TEXT)


@pytest.fixture(scope="module")
def everything(mixture):
    """All documents in one string, and the items."""
    return "".join(mixture.documents()), mixture.items()


def test_no_answer_of_a_test_item_stands_in_a_training_document(everything):
    text, items = everything
    new = [i for i in items if i.task in in_context.TASKS]
    assert len({i.task for i in new}) == 6 and len(new) > 500
    assert not [i for i in new if i.answer in text]
    operands = {re.search(r"\d+ [+*] \d+", i.prompt)[0] for i in items if i.task == "arithmetic"}
    assert len(operands) > 100
    assert not operands & set(re.findall(r"\d+ [+*] \d+", text))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_no_test_pair_is_trained_on_in_either_order(difficulty):
    def pairs(text):
        return {frozenset(pair) for pair in re.findall(r"(\d+) [+*] (\d+)", text)}

    trained = pairs("".join(some(arithmetic.documents(difficulty, SEED), 3000)))
    tested = pairs("\n".join(item.prompt for item in some(arithmetic.items(difficulty, SEED), 500)))
    assert len(trained) > 3000 and len(tested) > 300
    assert not trained & tested


def test_every_prompt_is_new_but_those_of_facts(everything):
    text, items = everything
    assert not [i for i in items if i.task != "facts" and i.prompt in text]
    prompts = [i.prompt for i in items]
    assert len(set(prompts)) == len(prompts)


def test_candidates_differ_and_chance_is_at_most_a_tenth(everything):
    for item in everything[1]:
        candidates = {item.answer, *item.distractors}
        assert len(candidates) == 1 + len(item.distractors)
        assert item.chance == 1 / len(candidates) <= 0.1
        assert item.answer.startswith(" ") and not item.prompt.endswith(" ")


@pytest.mark.parametrize(("task", "difficulty"), LEVELS)
def test_a_guess_that_knows_nothing_is_right_in_a_tenth(task, difficulty):
    """It prefers some characters in some places, whatever the prompt says."""
    items = some(in_context.items(task, difficulty, SEED), 600)
    likes = np.random.default_rng(0).normal(size=(len(items), 64, 128))

    def best(item, liked):
        candidates = (item.answer, *item.distractors)
        return max(candidates, key=lambda c: sum(liked[i, ord(x)] for i, x in enumerate(c)))

    right = sum(best(i, liked) == i.answer for i, liked in zip(items, likes, strict=True))
    assert abs(right / len(items) - 0.1) < 4 * (0.1 * 0.9 / len(items)) ** 0.5


def test_answers_of_copying_needle_and_pairs_are_in_the_prompt(everything):
    for item in everything[1]:
        if item.task == "copying":
            assert item.prompt == f"copy{item.answer} :"
            assert len(item.answer.split()) == COPIED[item.difficulty]
        if item.task == "needle":
            name = item.prompt.split()[-2]
            assert f"the code of {name} is{item.answer} ." in item.prompt
        if item.task == "multi_query":
            name = item.prompt.split()[-1]
            assert item.prompt.count(f" {name}{item.answer} ;") == 1


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_variables_are_followed(difficulty):
    """By a small interpreter."""
    for item in some(in_context.items("tracking", difficulty, SEED), 50):
        values: dict[str, str] = {}
        *lines, asked = item.prompt.split(" ; ")
        for line in lines:
            name, _, value = line.partition(" = ")
            values[name] = values.get(value, value)
        assert " " + values[asked.removesuffix(" is")] == item.answer
        others = {" " + value for value in values.values()} - {item.answer}
        assert others <= set(item.distractors)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_sums_are_right(difficulty):
    text = "".join(some(arithmetic.documents(difficulty, SEED), 50))
    items = some(arithmetic.items(difficulty, SEED), 50)
    lines = text.splitlines() + [item.prompt + item.answer for item in items]
    assert len(lines) == 250
    for line in lines:
        modulus, a, operation, b, result = re.fullmatch(
            r"mod (\d+) : (\d+) ([+*]) (\d+) = (\d+)", line
        ).groups()
        value = int(a) + int(b) if operation == "+" else int(a) * int(b)
        assert int(result) == value % int(modulus)


@pytest.mark.parametrize(("task", "difficulty"), LEVELS)
def test_documents_and_items_are_a_function_of_the_seed(task, difficulty):
    def made(seed):
        documents = some(in_context.documents(task, difficulty, seed), 20)
        return documents, some(in_context.items(task, difficulty, seed), 20)

    assert made(1) == made(1)
    assert not set(made(1)[0]) & set(made(2)[0])


def test_the_numbers_of_a_seed_stay_the_same():
    """Written down from the first version: with others, the same name would mean other tasks."""
    draw = Draw(0, "needle", "easy")
    assert [draw.below(1000) for _ in range(4)] == [568, 212, 759, 662]
    assert draw.some("abcdef", 6) == list("caedfb") and draw.name() == "Katidu Rakoga"


def test_rows_to_copy_have_no_row_for_testing_in_them():
    draw = Draw(SEED)
    for length in COPIED.values():
        for _ in range(100):
            letters = draw.copied(length, testing=False).split()
            parts = (
                spaced(letters[i : i + n]) for n in COPIED.values() for i in range(length - n + 1)
            )
            assert not any(for_testing(part, 0.02) for part in parts)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_facts_are_stated_as_often_as_told(difficulty):
    frequencies, count = (1, 3, 9), 12
    made = facts.Facts(difficulty, SEED, frequencies, count)
    stated = Counter("".join(made.documents()).splitlines())
    names: Counter[str] = Counter()
    for line, times in stated.items():
        names[_entity(line)] += times
    assert Counter(names.values()) == dict.fromkeys(frequencies, count)
    items = made.items(limit=100)
    assert Counter(item.frequency for item in items) == dict.fromkeys(frequencies, count)
    for item in items:
        (true,) = {v for v in (item.answer, *item.distractors) if _stated(stated, item, v)}
        assert true == item.answer
        asked_as_stated = stated[item.prompt + item.answer + "."]
        assert asked_as_stated == (0 if difficulty == "hard" else item.frequency)
    assert len(made.items(limit=5)) == 5 * len(frequencies)


@pytest.mark.parametrize("count", [10, 12, 38, 45, 53, 97, 250])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_counts_of_values_tell_nothing_about_facts(difficulty, count):
    """A guess by training counts alone, the candidate stated most often (by attribute, without the
    name), is right in a tenth of the items of every frequency; ties count 1 / n."""
    frequencies = (1, 4, 16, 64)
    for seed in range(3):
        made = facts.Facts(difficulty, seed, frequencies, count)
        stated: Counter[tuple[str, str]] = Counter()
        for document in made.documents():
            for line in document.splitlines():
                stated[_attribute(line), line.removesuffix(".").split()[-1]] += 1
        right: dict[int, list[float]] = {f: [] for f in frequencies}
        for item in made.items(limit=1000):
            attribute = _attribute(item.prompt)
            counts = [stated[attribute, c.strip()] for c in (item.answer, *item.distractors)]
            best = counts[0] == max(counts)
            right[item.frequency].append(best / counts.count(max(counts)))
        for scores in right.values():
            assert count - 4 <= len(scores) <= count
            error = (0.1 * 0.9 / len(scores)) ** 0.5
            assert sum(scores) / len(scores) <= 0.1 + 2 * error


def _attribute(line):
    (found,) = set(line.split()) & set(facts.ATTRIBUTES["hard"])
    return found


def _entity(line):
    """The name of two words in a statement or question."""
    return re.findall(r"[A-Z]\w+ [A-Z]\w+", re.sub(r"^(Asked for the|The)", "", line))[0]


def _stated(stated, item, value):
    return any(_entity(item.prompt) in line and value in line for line in stated)


def test_too_few_bytes_for_facts_are_refused():
    config = TasksConfig(names=("facts",), share=0.1)
    with pytest.raises(UserError, match=r"enough for 1 of each frequency, and 10 are needed"):
        Mixture(config, 50_000)


@pytest.mark.parametrize("names", [TASKS, ("copying",), ("facts",), ("arithmetic", "facts")])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_share_is_the_one_asked_for_and_even(names, share):
    texts = [f"{i} " * 40 for i in range(1000)]
    size = sum(map(len, texts))
    mixture = Mixture(TasksConfig(names=names, share=share, frequencies=(1, 4)), size)
    mixed = list(interleave(texts, size, mixture))
    assert [text for text, of_task in mixed if not of_task] == texts
    assert sorted(text for text, of_task in mixed if of_task) == sorted(mixture.documents())
    sizes = [len(text) * of_task for text, of_task in mixed]
    total = sum(len(text) for text, _ in mixed)
    assert sum(sizes) / total == pytest.approx(share, abs=0.015)
    half = len(mixed) // 2
    assert sum(sizes[:half]) / sum(len(t) for t, _ in mixed[:half]) == pytest.approx(
        share, abs=0.03
    )


def test_an_answer_in_the_text_is_no_test():
    items = some(in_context.items("needle", "easy", SEED), 30)
    assert len({item.answer for item in items}) > 6
    unseen = Unseen(items)
    unseen.read(f"first words{items[0].answer} and more")
    unseen.read(f"a line\n{items[1].answer.strip()}, end")
    unseen.read(f"inside of z{items[2].answer} z b c{items[3].answer}xyz")
    gone = {item.answer for item in items[:4]}
    kept = unseen.keep(limit=10)
    assert kept == [item for item in items if item.answer not in gone][:10]
