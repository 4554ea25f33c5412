"""Named texts, scored by --mode=evaluate and while training (train.evaluations)."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from engram_jax.checkpoint.results import TEXTS, read_results
from engram_jax.monitoring.metrics import read_metrics
from tests.runs import launched, refused, small_run

BOOKS = ["abcd efgh 🙂🙂 漢字", "document 3\nabij cdef\n", "jihg abcd abij"]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "books"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in BOOKS))
    return folder


def evaluated(corpus, workdir, texts, *more):
    given = ["--mode=evaluate", f"--texts={texts}", *more]
    return launched(*small_run(corpus, workdir), *given)


def test_a_checkpoint_s_bits_per_byte(corpus, undisturbed, books, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    done = evaluated(corpus, workdir, f"held_out,books={books}", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    own = json.loads((workdir / "losses.json").read_text())["held_out_loss"]
    held_out = found["texts"]["held_out"]
    assert held_out["nats_per_token"] == own["nats_per_token"]["engram_tiny"]
    assert held_out["tokens"] + held_out["ends"] == own["targets"]

    told = found["texts"]["books"]
    assert told["documents"] == told["ends"] == len(BOOKS)
    # all three begin with a character of one byte, which is its own token
    assert told["bytes"] == len("".join(BOOKS).encode()) - len(BOOKS)
    nats = told["nats_per_token"] * (told["tokens"] + told["ends"])
    of_ends = told["nats_per_end"] * told["ends"]
    bits = (nats - of_ends) / math.log(2)
    assert told["bits_per_byte"] == pytest.approx(bits / told["bytes"], rel=1e-9)
    assert sum(b["tokens"] for b in told["by_position"]) == told["tokens"]
    assert found["all"]["bytes"] == told["bytes"] + held_out["bytes"]

    (record,) = read_results(workdir, 24)
    assert record["kind"] == TEXTS and "step 24" in record["checkpoint"]
    del found["results"]
    assert record["result"] == found
    lines = evaluated(corpus, workdir, f"books={books}").out.splitlines()
    (line,) = [line for line in lines if line.startswith("books ")]
    assert f"{told['bits_per_byte']:.4f}" in line
    assert len(read_results(workdir, 24)) == 2


def test_what_cannot_be_scored(corpus, undisturbed, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(evaluated(corpus, undisturbed, f"a={tmp_path}/no"), "--texts", "no such folder or file")
    refused(evaluated(corpus, undisturbed, f"a={tmp_path}/empty"), "--texts", "no text")
    refused(evaluated(corpus, undisturbed, "a"), "--texts=a: must be NAME=PATH")
    refused(evaluated(corpus, undisturbed, "a=x", "--tasks"), "--texts: not with --tasks")
    refused(launched(*small_run(corpus, undisturbed), "--texts=a=b"), "only for --mode=evaluate")


def of_texts(workdir):
    return {
        record["step"]: {k: v for k, v in record.items() if k not in ("step", "time")}
        for record in read_metrics(workdir)
        if any(key.startswith("evaluations/") for key in record)
    }


@pytest.mark.slow
@pytest.mark.proof
def test_while_training_and_resumed(corpus, undisturbed, books, tmp_path):
    """At their own cadence and at the end; the run is the undisturbed one, bit for bit, also where
    it is interrupted, and the last values are --mode=evaluate's on the same batches."""
    workdir, again = tmp_path / "run", tmp_path / "again"
    given = small_run(corpus, workdir, train__evaluations=f"books={books}@5", train__keep=9)
    done = launched(*given)
    assert done.code == 0, done.err
    found = of_texts(workdir)
    assert list(found) == [5, 10, 15, 20, 24]
    losses = [[r["loss"] for r in read_metrics(w) if "loss" in r] for w in (workdir, undisturbed)]
    assert losses[0] == losses[1]
    ends = [json.loads((w / "losses.json").read_text()) for w in (workdir, undisturbed)]
    assert ends[0]["held_out_loss"] == ends[1]["held_out_loss"]

    shutil.copytree(workdir, again)
    for step in (18, 21, 24):
        shutil.rmtree(again / "checkpoints" / str(step), ignore_errors=True)
    more = small_run(corpus, again, train__evaluations=f"books={books}@5", train__keep=9)
    done = launched(*more)
    assert done.code == 0 and "resumed from step 15" in done.out, done.err
    assert of_texts(again) == found

    done = evaluated(corpus, workdir, f"books={books}", "--json")
    told = json.loads(done.out)["texts"]["books"]
    whole = told["tokens"] + told["ends"] <= 2 * 4 * 16  # eval_batches batches
    assert whole and found[24]["evaluations/books/tokens"] == told["tokens"]
    for key in ("nats_per_token", "bits_per_byte"):
        np.testing.assert_allclose(found[24][f"evaluations/books/{key}"], told[key], rtol=1e-6)


def test_a_text_that_is_not_there(corpus, tmp_path):
    given = small_run(corpus, tmp_path / "run", train__evaluations=f"a={tmp_path}/no@2")
    done = launched(*given)
    assert done.code == 2 and "error: config.train.evaluations" in done.err, done.err
    assert not (tmp_path / "run").exists()
