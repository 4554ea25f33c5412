"""`--mode=long-ppl` as a user starts it."""

from __future__ import annotations

import json
import shutil

import pytest

from engram_jax.checkpoint.results import LONG_PPL, read_results
from tests.runs import launched, refused, small_run


def scored(corpus, workdir, *more):
    return launched(*small_run(corpus, workdir), "--mode=long-ppl", *more)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("books") / "book.txt"
    file.write_text("abcd efgh abij cdef " * 12)
    return file


def test_a_checkpoint_and_another_evaluator(corpus, undisturbed, book, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    given = [f"--texts=book={book},held_out", "--truncated=4", "--stride=4", "--limit=8", "--json"]
    done = scored(corpus, workdir, *given)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["context"], found["truncated"], found["stride"]) == (16, 4, 4)
    book_, held_out = found["texts"]["book"], found["texts"]["held_out"]
    assert book_["texts"] == held_out["texts"] == 8 and book_["documents"] == 1
    # a text's first token is not predicted; no text is longer than the context
    assert 8 * 4 <= book_["tokens"] <= 8 * 15
    assert found["all"]["tokens"] == book_["tokens"] + held_out["tokens"]
    assert found["all"]["documents"] == 1 + held_out["documents"]

    other = json.loads(scored(corpus, workdir, *given, f"--evaluator={undisturbed}@18").out)
    assert "step 18" in other["evaluator"] and "step 24" in found["evaluator"]
    assert other["texts"]["book"]["perplexity"] == book_["perplexity"]
    records = read_results(workdir, 24)
    assert {record["kind"] for record in records} == {LONG_PPL} and len(records) == 2
    assert records[-1]["result"]["evaluator"] == other["evaluator"]


def test_what_cannot_be_scored(corpus, undisturbed, book, tmp_path):
    refused(scored(corpus, undisturbed), "--texts: missing")
    texts = f"--texts=book={book}"
    refused(scored(corpus, undisturbed, texts, "--truncated=16"), "--truncated=16: must be less")
    refused(scored(corpus, undisturbed, texts, "--limit=0.5"), "--limit=0.5: must be a whole")
    refused(scored(corpus, undisturbed, texts, f"--evaluator={tmp_path}"), "no trained model there")
    refused(scored(corpus, undisturbed, texts, "--evaluator=a@b"), "after @ must stand")
    short = tmp_path / "short.txt"
    short.write_text("ab")
    line = scored(corpus, undisturbed, f"--texts=a={short}", "--truncated=12", "--stride=1")
    refused(line, "--texts: a: none of its 1 texts has more than --truncated=12 tokens")
