"""RULER by lm-eval's own code on local files: prompts that a plain program solves, scores of models
that copy the answers and that say anything, and what is left out.

All 13 tasks are built once, at lm-eval's smallest length and at one that is too short for some.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")

from lm_eval.api.model import LM
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_jax.config.errors import UserError
from engram_jax.harness import evaluate, loading, ruler
from engram_jax.harness.loading import Asked, Loaded, load_tasks
from engram_jax.tasks import in_context, ruler_form
from scripts import ruler_data
from tests.harness import local_tasks
from tests.scripts.test_ruler_data import debian_text

LENGTH, SHORT, LIMIT = 4096, 220, 4
QA = ("ruler_qa_squad", "ruler_qa_hotpot")


def tokenizer() -> Tokenizer:
    """A token for a word, a digit, a sign."""
    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    split = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    made.encode_special_tokens = True
    return made


READS = ruler.Reads(tokenizer(), LENGTH)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder, its questions and essays from a small text, its words few: lm-eval pairs all."""
    root = tmp_path_factory.mktemp("ruler")
    draw = random.Random(0)
    letters = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(1200)]
    (root / "words").mkdir()
    for number, name in enumerate(("nouns", "adjectives", "verbs")):
        (root / "words" / f"{name}.txt").write_text("\n".join(letters[number::3]) + "\n")
    (root / "data").mkdir()
    punkt = root / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    text = debian_text(root / "text")
    ruler_data.train_punkt(text / ruler_data.PROSE[0], punkt)
    ruler_data.fill(text, root / "data", punkt=punkt.parent, words=root / "words")
    return root / "data"


@pytest.fixture(scope="module")
def manager():
    return loading._manager(None, ["ruler"])  # of the 14 files alone


@pytest.fixture(scope="module")
def configs(manager):
    found = list(loading.configs_of(manager.task_index, "ruler"))
    assert len(found) == 13 and all(map(ruler.is_ruler, found))
    return found


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def built(configs, data):
    asked = ruler.RulerAsked((SHORT, LENGTH), data)
    return ruler.build(configs, asked, READS, LIMIT, seconds=lambda n: 1 if n == SHORT else 120)


@pytest.fixture(scope="module")
def group(manager, configs, built, told):
    (found,) = ruler.load(manager, "ruler", configs, built, READS, told.append)
    return found


def solved(task: str, prompt: str) -> list[str]:
    """The answers of a synthetic task's prompt, by its words alone."""
    if task.startswith("niah"):
        asked = re.findall(r"special magic (?:numbers?|uuids?) for (.+?) mentioned in", prompt)[-1]
        keys = re.split(r", and |, ", asked)
        return [v for k in keys for v in re.findall(rf"magic \w+ for {k} is: ([\w-]+)\.", prompt)]
    if task == "ruler_vt":
        own = prompt[prompt.rindex("Memorize and track") :]
        value = re.findall(r"assigned the value (\d+)", own)[-1]
        found = re.findall(rf"VAR (\w+) = {value}", own)
        for name in found:
            found += re.findall(rf"VAR (\w+) = VAR {name}\b", own)
        return found
    if task == "ruler_cwe":
        listed = prompt[: prompt.rindex("Question:")]
        return [w for w, _ in Counter(re.findall(r"\d+\. (\w+)", listed)).most_common(10)]
    assert task == "ruler_fwe"
    coded = prompt[prompt.index("coded words. ") + 13 : prompt.rindex("\nQuestion:")]
    return [w for w, _ in Counter(coded.replace("...", " ").split()).most_common(3)]


class Answering(LM):
    """Answers prompts by a function of task, prompt and document."""

    def __init__(self, answer):
        super().__init__()
        self.max_length, self._answer = LENGTH, answer

    def generate_until(self, requests, disable_tqdm=False):
        for request in requests:  # the model reads the prompt, and has room for the answer
            prompt, how = request.args
            assert len(tokenizer().encode(prompt).ids) + how["max_gen_toks"] <= LENGTH
        return [self._answer(r.task_name, r.args[0], r.doc) for r in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise AssertionError

    loglikelihood_rolling = loglikelihood


def scores(manager, group, built, answer):
    one = Loaded("ruler", [group], None, manager, about=built.about([]))
    return evaluate._score(Answering(answer), one, Asked(("ruler",)), print)


@pytest.mark.slow
def test_a_plain_program_solves_every_synthetic_prompt(built):
    count = 0
    for task, by_length in built.documents.items():
        for document in by_length.get(LENGTH, ()):
            prompt, answers = document["input"], document["outputs"]
            count += 1
            if task in QA:
                assert any(answer in prompt for answer in answers)
            else:
                assert sorted(solved(task, prompt)) == sorted(answers), task
    assert count == 13 * LIMIT


@pytest.mark.slow
def words(prompt: str) -> str:
    """A prompt without filler, what is drawn in it being marks; only the last of several."""
    prompt = prompt[prompt.rfind("Memorize and track") :] if "Memorize" in prompt else prompt
    for sentence in ruler_form._FILLER:
        prompt = prompt.replace(sentence.strip(), "")
    for pattern, mark in ((r"\b\d+\b(?! variables)", "N"), (r"\b[A-Z]{5}\b", "X")):
        prompt = re.sub(pattern, mark, prompt)
    return " ".join(re.sub(r"\S+-\S+", "key", prompt).split())


@pytest.mark.parametrize(
    ("ours", "theirs"), [("ruler_needle", "niah_single_1"), ("ruler_tracking", "ruler_vt")]
)
def test_our_tasks_have_the_words_of_rulers(ours, theirs, built):
    """Prompts that are trained on, and lm-eval's."""
    (document, *_) = built.documents[theirs][LENGTH]
    (item,) = itertools.islice(in_context.items(ours, "medium", 0), 1)
    assert words(item.prompt) == words(f"{document['input']} {document['gen_prefix']}")


def test_lengths_are_near_what_is_asked(built):
    for task in set(built.documents) - {*QA}:  # of passages there are few here
        for document in built.documents[task][LENGTH]:
            size = len(tokenizer().encode(document["input"]).ids)
            assert 0.7 * LENGTH < size <= LENGTH, (task, size)


@pytest.mark.slow
def test_a_model_that_copies_the_answers_scores_all(manager, group, built):
    def oracle(task, prompt, document):
        return " ".join(document["outputs"] if task in QA else solved(task, prompt))

    found = scores(manager, group, built, oracle)
    for task in built.documents:
        assert found["results"][task][f"{LENGTH},none"] == 1.0, task
        assert not any(value == -1 for value in found["results"][task].values())
    assert found["groups"]["ruler"][f"{LENGTH},none"] == 1.0
    assert found["results"].keys() == {*built.documents, "ruler"}


@pytest.mark.slow
def test_a_model_that_says_anything_scores_nothing(manager, group, built):
    draw = random.Random(1)
    found = scores(manager, group, built, lambda *_: " ".join(draw.choices("abcdefgh", k=30)))
    for task in built.documents:
        assert found["results"][task][f"{LENGTH},none"] < 0.05, task
    assert json.loads(evaluate.as_json(found))["results"].keys() == found["results"].keys()


@pytest.mark.slow
def test_what_the_model_cannot_read_is_counted(manager, configs, built, group, told):
    """lm-eval's length leaves out the beginning of the answer: of a model that reads just what it
    counts, prompts are left out."""
    task = next(c for c in configs if c["task"] == "niah_single_3")
    documents = built.documents["niah_single_3"][LENGTH]
    texts = [f"{d['input']} {d['gen_prefix']}" for d in documents]
    sizes = [len(tokenizer().encode(text).ids) + 128 for text in texts]  # UUIDs' digits vary
    assert all(size > d["length"] for size, d in zip(sizes, documents, strict=True))
    middle = sorted(sizes)[LIMIT // 2]
    reads, lines = ruler.Reads(tokenizer(), middle), []
    alone = ruler.Built((LENGTH,), {"niah_single_3": {LENGTH: documents}})
    (made,) = ruler.load(manager, "niah_single_3", [task], alone, reads, lines.append)
    kept = sum(size <= middle for size in sizes)
    assert 0 < kept < LIMIT and len(made.eval_docs) == kept
    assert alone.told == {"niah_single_3": {"4096": {"built": LIMIT, "scored": kept}}}
    (line,) = lines
    assert f"{LIMIT - kept} of {LIMIT} prompts are left out" in line
    none = ruler.Built((LENGTH,), {"niah_single_3": {LENGTH: documents}})
    reads = ruler.Reads(tokenizer(), min(sizes) - 1)
    assert ruler.load(manager, "niah_single_3", [task], none, reads, lines.append) == []
    assert (
        f"all {LIMIT} prompts: with the answer longer"
        in none.errors["niah_single_3 at 4,096 tokens"]
    )


@pytest.mark.slow
def test_lengths_that_are_too_short_are_refused_in_a_line(built):
    """Where lm-eval's code ends with an error, and where it would try for ever."""
    assert all(f" at {SHORT} tokens" in name for name in built.errors)
    assert not any("\n" in why for why in built.errors.values())
    never = "found no prompt of 220 tokens in 1 seconds of processor time"
    assert never in built.errors[f"ruler_vt at {SHORT} tokens"]
    assert "ask about nothing" in built.errors[f"ruler_cwe at {SHORT} tokens"]
    assert "Could not generate any sample" in built.errors[f"niah_multivalue at {SHORT} tokens"]
    assert SHORT in built.documents["ruler_fwe"]  # it fits


@pytest.mark.slow
def test_the_results_say_what_the_data_is(data, built):
    about = built.about(["ruler_fwe"])["data"]
    assert not about["essays"]["original"] and "not Paul Graham's" in about["essays"]["source"]
    assert "not SQuAD" in about["dev-v2.0.json"]["source"]
    file = data / ruler_data.SQUAD
    before = file.read_bytes()
    file.write_bytes(before + b" ")  # another file than the manifest tells of
    try:
        told = ruler._sources(data)[ruler_data.SQUAD]
    finally:
        file.write_bytes(before)
    assert told == {"source": "as given; manifest.json does not tell", "original": None}
    found = {"results": {}, "groups": {}, "versions": {}, "n-shot": {}, "higher_is_better": {}}
    printed = evaluate.table({**found, "configs": {}, "ruler": {"data": about}})
    assert "RULER's essays: running text of Debian's" in printed


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ruler": ruler.RulerAsked((8192,))}, "--ruler_lengths=8192: must be at most 4096"),
        ({"shots": 2}, "--num_fewshot=2: RULER's tasks have no examples"),
        (
            {"ruler": ruler.RulerAsked(data=Path("/no/such"))},
            "--ruler_data=/no/such: no such folder",
        ),
    ],
)
def test_refused(asked, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load_tasks(Asked(("ruler",), **asked), lambda: READS)


def test_a_file_that_is_missing_is_a_line(tmp_path):
    """And `load_tasks` goes on: nothing is left, each task says why."""
    asked = Asked(("ruler_qa_squad",), ruler=ruler.RulerAsked(data=tmp_path))
    loaded, missing = load_tasks(asked, lambda: READS)
    assert loaded == []
    (line,) = missing.values()
    assert "dev-v2.0.json: no such file; `python -m scripts.ruler_data` fills" in line


def test_flags_without_a_task_of_ruler(tmp_path):
    local_tasks.write(tmp_path, "rolling", local_tasks.ROLLING, test=[{"text": "a"}])
    asked = Asked(("rolling",), include=tmp_path, ruler=ruler.RulerAsked((4096,)))
    with pytest.raises(UserError, match="--ruler_lengths: only with tasks of RULER"):
        load_tasks(asked)
