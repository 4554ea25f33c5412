"""The preset's tasks are in the installed lm-eval, with the paper's shots."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

import lm_eval.tasks
from lm_eval.tasks._index import TaskIndex

from engram_jax.harness.loading import configs_of
from engram_jax.harness.paper import BENCHMARKS
from tests.runs import ROOT

FOLDERS = (
    *("mmlu", "mmlu_pro", "ceval", "cmmlu", "agieval", "bbh", "arc", "hellaswag", "piqa"),
    *("winogrande", "triviaqa", "drop", "humaneval", "mbpp", "cruxeval", "gsm8k", "minerva_math"),
)
# What is known of the benchmarks: how many tasks each has.
SIZES = {"MMLU": 57, "MMLU-Pro": 14, "C-Eval": 52, "CMMLU": 67, "BBH": 27, "MATH": 7, "CRUXEval": 2}


@pytest.fixture(scope="module")
def index():
    root = Path(lm_eval.tasks.__file__).parent
    groups = root / "benchmarks" / "minerva_math.yaml"
    found = TaskIndex.build([root / folder for folder in FOLDERS])
    from lm_eval.tasks._yaml_loader import load_yaml

    TaskIndex.process_cfg(load_yaml(groups, resolve_func=False), groups, found)
    return found


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_tasks_and_shots(index, benchmark):
    leaves = [leaf for name in benchmark.tasks for leaf in configs_of(index, name)]
    assert None not in leaves
    if benchmark.name in SIZES:
        assert len(leaves) == SIZES[benchmark.name]
    assert bool(leaves) == (benchmark.name != "C3")
    for leaf in leaves:
        own = leaf.get("num_fewshot")
        if benchmark.own:
            assert own == benchmark.shots
        else:  # lm-eval lets a task that has none by itself have no others
            assert own != 0 or benchmark.shots == 0
        listed = [str(m["metric"]) for m in leaf.get("metric_list", [])]
        metric = benchmark.metric.partition(",")[0].replace("@1", "_at_k")
        assert any(name.endswith(metric) for name in listed), listed
        runs_code = benchmark.name in ("HumanEval", "MBPP", "CRUXEval")
        assert bool(leaf.get("unsafe_code")) == runs_code


def test_the_page_has_the_same_table():
    text = (ROOT / "docs" / "lm_eval.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| (\d+) \| ([^|]+) \|", text, re.M)
    told = [
        (name, int(shots), tuple(re.findall(r"`([^`]+)`", tasks))) for name, shots, tasks in rows
    ]
    assert told == [(b.name, b.shots, b.tasks) for b in BENCHMARKS]
