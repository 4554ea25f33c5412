"""The page of checkpoints side by side, from results as the modes write them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from engram_jax.checkpoint.results import LM_EVAL, LONG_PPL, TEXTS, read_results, write_result
from engram_jax.config.errors import UserError
from engram_jax.harness.paper import BENCHMARKS, RULER
from engram_jax.harness.results_page import FILES, report
from tests.runs import launched, refused


def made(folder, step=24):
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return SimpleNamespace(step=step, name=f"{folder.name}, step {step}", digest="d")


def lm_eval(results, shots, **more):
    """A result as lm-eval tells it; tests/run/test_lm_eval_mode.py has a real one."""
    return {"results": results, "n-shot": shots, "group_subtasks": {}, **more}


def mmlu(value, error, subject=0.5):
    results = {
        "mmlu": {"acc,none": value, "acc_stderr,none": error, "alias": "mmlu"},
        "mmlu_law": {"acc,none": subject, "acc_stderr,none": 0.1},
    }
    return lm_eval(results, {"mmlu_law": 5}, group_subtasks={"mmlu": ["mmlu_law"]})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with all kinds of results, some of one run alone."""
    root = tmp_path_factory.mktemp("runs")
    a, b = root / "a", root / "b"
    of_a, of_b = made(a), made(b)
    nats, targets = np.array([3.0, 5.0, 8.0]), np.array([2, 2, 5])
    np.savez(a / "held_out_documents.npz", nats=nats, targets=targets, step=24)

    asked = {"tasks": ["mmlu"], "limit": None}
    write_result(a, LM_EVAL, of_a, {**asked, "limit": 10.0}, mmlu(0.9, 0.09))
    write_result(a, LM_EVAL, of_a, asked, mmlu(0.604, 0.004))  # the newer one is shown
    write_result(a, LM_EVAL, of_a, {**asked, "off_layers": [-1]}, mmlu(0.3, 0.01))
    write_result(b, LM_EVAL, of_b, {**asked, "limit": 100.0}, mmlu(0.574, 0.05))
    crux = {
        "cruxeval_input": {"pass@1,create_test": 0.2, "pass@1_stderr,create_test": 0.03},
        "cruxeval_output": {"pass@1,create_test": 0.4, "pass@1_stderr,create_test": 0.04},
        "my_task": {"acc,none": 0.75, "acc_stderr,none": "N/A", "alias": "my_task"},
    }
    write_result(b, LM_EVAL, of_b, {"tasks": ["x"], "limit": None}, lm_eval(crux, {}))
    ruler = {
        task: {"4096,none": -1, "256,none": value, "256_stderr,none": "N/A"}
        for task, value in (("ruler_qa_squad", 0.3), ("ruler_qa_hotpot", 0.5), ("ruler_vt", 0.8))
    }
    counts = {task: {"original": 50, "effective": 50} for task in ruler}
    found = lm_eval(ruler, {}, **{"n-samples": counts})
    write_result(a, LM_EVAL, of_a, {"tasks": ["ruler"], "limit": None}, found)

    scored = {"bits_per_byte": 1.25, "bits_per_byte_stderr": 0.02, "digest": "0" * 32}
    texts = {"seq_len": 256, "texts": {"books": scored}}
    write_result(a, TEXTS, of_a, {"texts": {}}, texts)
    for run, model, value, judge in ((a, of_a, 4.14, "large"), (b, of_b, 4.38, "large")):
        of = {
            "long_ppl": value,
            "long_ppl_stderr": 0.1,
            "perplexity": 9.0,
            "perplexity_stderr": None,
        }
        rule = {"context": 2048, "truncated": 256, "stride": 64, "evaluator": judge}
        result = {**rule, "texts": {"books": of, "none": of | {"long_ppl": None}}}
        write_result(run, LONG_PPL, model, {"texts": "f" * 32}, result)
    return a, b


def rows_of(text):
    found = json.loads(text)
    return {row["name"]: row for table in found["tables"] for row in table["rows"]}


def test_every_number_is_the_one_that_was_written(runs):
    rows = rows_of(report([str(run) for run in runs], None, True))

    loss = rows["held-out loss"]["cells"]
    mean = 16 / 9
    spread = sum((n - mean * t) ** 2 for n, t in ((3, 2), (5, 2), (8, 5)))
    assert loss[0]["value"] == pytest.approx(mean) and loss[1] is None
    assert loss[0]["stderr"] == pytest.approx(math.sqrt(3 / 2 * spread) / 9)

    mmlu_ = rows["MMLU (acc)"]
    assert [cell["value"] for cell in mmlu_["cells"]] == pytest.approx([60.4, 57.4])
    assert [cell["stderr"] for cell in mmlu_["cells"]] == pytest.approx([0.4, 5.0])
    assert not mmlu_["alike"]  # of one run it was limited
    assert mmlu_["cells"][1]["how"] == "5 shots, limit 100"
    assert "mmlu_law (acc,none)" not in rows  # is inside

    crux = rows["CRUXEval (pass@1)"]["cells"]
    assert crux[0] is None
    assert (crux[1]["value"], crux[1]["stderr"]) == pytest.approx((30.0, 2.5))

    # lm-eval tells no error of these; of numbers in [0, 1] it is at most this
    qa = rows["RULER QA, 256 tokens"]["cells"][0]
    error = 100 * math.sqrt(0.3 * 0.7 / 50 + 0.5 * 0.5 / 50) / 2
    assert (qa["value"], qa["stderr"], qa["bound"]) == (
        pytest.approx(40),
        pytest.approx(error),
        True,
    )
    assert rows["RULER VT, 256 tokens"]["cells"][0]["value"] == pytest.approx(80)
    assert not any("4,096" in name or "niah" in name for name in rows)

    assert rows["books"]["cells"][0]["value"] == 1.25 and rows["books"]["lower_is_better"]
    long = rows["LongPPL books, 2,048 tokens"]
    assert [cell["value"] for cell in long["cells"]] == [4.14, 4.38] and long["alike"]
    assert rows["perplexity none, 2,048 tokens"]["cells"][0]["stderr"] is None
    assert "LongPPL none, 2,048 tokens" not in rows
    own = rows["my_task (acc,none)"]["cells"]
    assert own[0] is None and (own[1]["value"], own[1]["stderr"]) == (0.75, None)


def test_the_page(runs, tmp_path):
    a, b = runs
    done = launched("--mode=report", f"--runs={a},{b}@24", f"--output={tmp_path / 'page'}")
    assert done.code == 0, done.err
    html, markdown, text = ((tmp_path / "page" / name).read_text() for name in FILES)
    assert markdown.rstrip("\n") == done.out.rstrip("\n")
    line = "| MMLU (acc) [not alike] | % | 60.40 ± 0.40 | 57.40 ± 5.00 |"
    assert line in markdown.splitlines()
    assert "| RULER VT, 256 tokens | % | 80.00 ± ≤ 5.66 | - |" in markdown
    assert "| MMLU (acc) | 5 shots | 5 shots, limit 100 |" in markdown  # what is not alike
    assert "a, step 24: 1" in markdown  # left out: the memory was off
    assert "<td>60.40 ± 0.40</td>" in html and "MMLU" in html
    assert rows_of(text) == rows_of(launched("--mode=report", f"--runs={a},{b}", "--json").out)


def test_names_of_runs(runs, tmp_path):
    """The folder's; with its path where another one has the same name."""
    a, b = runs
    (a / "checkpoints" / "9").mkdir()
    other = tmp_path / "a"
    made(other)
    given = [f"{a}@9", str(a), str(b), str(other)]
    told = [run["name"] for run in json.loads(report(given, None, True))["runs"]]
    assert told == [f"{a}, step 9", f"{a}, step 24", "b, step 24", f"{other}, step 24"]
    told = [run["name"] for run in json.loads(report(given[:3], None, True))["runs"]]
    assert told == ["a, step 9", "a, step 24", "b, step 24"]
    (a / "checkpoints" / "9").rmdir()


def test_what_cannot_be_shown(runs, tmp_path):
    a, _ = runs
    for given, words in (
        ([f"--runs={tmp_path}"], "no trained model there"),
        ([f"--runs={a}@7"], "there are checkpoints of steps 24"),
        ([f"--runs={a}@x"], "after @ must stand"),
        ([f"--runs={a},{a}"], "is there twice"),
        ([], "--runs: missing"),
        ([f"--runs={a}", f"--workdir={a}"], "--workdir: not for --mode=report"),
        ([f"--runs={a}", "--config.train.steps=3"], "config"),
    ):
        refused(launched("--mode=report", *given), words)
    made(tmp_path / "new")
    refused(launched("--mode=report", f"--runs={tmp_path / 'new'}"), "nothing was measured")
    broken = tmp_path / "new" / "evaluations" / "24"
    broken.mkdir(parents=True)
    (broken / "x.json").write_text('{"kind": 3}')
    with pytest.raises(UserError, match=r"x\.json: is no result of an evaluation"):
        read_results(tmp_path / "new", 24)


def test_the_same_question_replaces_its_answer(tmp_path):
    model = made(tmp_path / "run")
    for value in (1, 2):
        write_result(tmp_path / "run", TEXTS, model, {"a": 1}, {"value": value, "x": math.inf})
    write_result(tmp_path / "run", TEXTS, model, {"a": 2}, {"value": 3})
    values = [record["result"]["value"] for record in read_results(tmp_path / "run", 24)]
    assert values == [2, 3]


def test_names_of_the_tables():
    assert [column.name for column in RULER] == ["S", "MK", "MV", "MQ", "VT", "CWE", "FWE", "QA"]
    assert sum(len(column.tasks) for column in RULER) == 13
    assert len({task for column in RULER for task in column.tasks}) == 13
    assert all(benchmark.metric for benchmark in BENCHMARKS)
