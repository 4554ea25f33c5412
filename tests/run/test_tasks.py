"""A run with synthetic tasks: scored at its end, in its report, and again from its folder alone."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.runs import TINY, launched, refused, small_run

TASKS = "('copying','facts')"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tasks") / "run"
    tasks = [f"--config.data.tasks.names={TASKS}", "--config.data.tasks.share=0.5"]
    tasks += ["--config.data.tasks.frequencies=(1,2)", "--config.data.tasks.test_items=12"]
    outcome = launched(*small_run(corpus, workdir), *tasks, "--config.data.seq_len=64")
    assert outcome.code == 0, outcome.err
    return workdir, outcome.out


@pytest.mark.slow
def test_scores_at_the_end_and_of_the_checkpoint_are_the_same(trained):
    workdir, out = trained
    scores = json.loads((workdir / "task_scores.json").read_text())
    groups = {(g["task"], g["frequency"]): g for g in scores["groups"]}
    assert list(groups) == [("copying", 0), ("facts", 1), ("facts", 2)]
    for group in groups.values():
        assert 10 <= group["items"] <= 12 and group["chance"] == pytest.approx(0.1)
        assert 0 <= group["off"]["accuracy"] <= 1
    assert "synthetic tasks" in out and "on, greedy" in out
    assert "Synthetic tasks" in (workdir / "report.md").read_text()
    again = launched("--mode=evaluate", "--tasks", "--json", f"--workdir={workdir}")
    assert again.code == 0, again.err
    assert json.loads(again.out.splitlines()[-1]) == scores


@pytest.mark.slow
def test_other_settings_of_the_tasks_are_another_run(trained):
    workdir, _ = trained
    outcome = launched(
        "--mode=evaluate", "--tasks", f"--workdir={workdir}", "--config.data.tasks.test_items=5"
    )
    assert (
        outcome.code == 2 and "config.data.tasks.test_items is 12 there and 5 here" in outcome.err
    )


def test_a_run_without_tasks_has_none_to_score(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    outcome = launched("--mode=evaluate", "--tasks", f"--workdir={workdir}")
    assert outcome.code == 2 and "trained without config.data.tasks" in outcome.err
    outcome = launched("--mode=train", "--tasks", f"--workdir={workdir}")
    assert outcome.code == 2 and "--tasks: only for --mode=evaluate" in outcome.err


@pytest.mark.parametrize(
    "mode",
    [["--mode=evaluate", "--tasks"], ["--mode=train", f"--config.data.tasks.names={TASKS}"]],
)
def test_orders_cannot_be_switched_off_for_tasks(tmp_path, mode):
    workdir = f"--workdir={tmp_path / 'run'}"
    outcome = launched(TINY, workdir, *mode, "--config.serve.off_orders=(2,)")
    refused(outcome, "config.serve.off_orders=(2,): not for scoring tasks")
    assert not list(tmp_path.iterdir())
