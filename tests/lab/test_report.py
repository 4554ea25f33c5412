"""The tidy table and the report of finished runs, whose files are written here."""

from __future__ import annotations

import csv
import dataclasses
import math

import numpy as np
import pyarrow.parquet as parquet
import pytest

from engram_jax.lab import figures, report
from engram_jax.lab.comparison import compare
from engram_jax.lab.plan import add_attempt, part
from engram_jax.lab.report import write_report
from engram_jax.lab.results import collect
from engram_jax.lab.statistics import Interval
from tests.lab.experiments import experiment, finish, write_documents, write_experiment
from tests.model.test_budgets import counted

TARGETS = np.array([100, 300, 200])
# By point and seed; the trials' other rates are worse.
LOSSES = {("rows=0", 0): 3.0, ("rows=0", 1): 3.2, ("rows=50", 0): 2.9, ("rows=50", 1): 3.0}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The plan with some finished runs, and what its report says."""
    folder = tmp_path_factory.mktemp("report")
    file = write_experiment(folder / "small.py", folder / "text")
    plan = part(experiment(file), folder / "out", [], [], lambda config: None)
    rates = {"MoE": 0.02, "Engram": 0.01}
    for launch in plan.trials():
        if launch.rate != rates[launch.point.family]:
            finish(plan, launch, 5.0)
    for launch in plan.runs(rates):
        loss = LOSSES.get((launch.point.name, launch.seed))
        if loss is not None:
            workdir = finish(plan, launch, loss)
            write_documents(workdir, loss * TARGETS, TARGETS)
            for spent in (20.0, 30.0):  # stopped once
                add_attempt(plan.folder, launch, {"seconds": spent, "cpu_seconds": 0.9 * spent})
    failed = plan.runs(rates)[-1]
    add_attempt(plan.folder, failed, {"seconds": 7.0, "status": 2, "why": "exit status 2: oh"})
    assert write_report(plan) == plan.folder / "report.html"
    return plan


def read_rows(plan) -> list[dict]:
    return parquet.read_table(plan.folder / "results.parquet").to_pylist()


def test_the_table_has_a_row_for_every_finished_run(sweep):
    rows = read_rows(sweep)
    assert len(rows) == 6
    used = {(row["point"], row["seed"]): row for row in rows if row["used"]}
    assert {key: row["held_out_loss"] for key, row in used.items()} == LOSSES
    assert [row["held_out_loss"] for row in rows if not row["used"]] == [5.0, 5.0]
    row = used["rows=50", 1]
    config = sweep.config(sweep.experiment.parse("rows=50,seed=1,rate=0.01"))
    expected, base = counted(config), counted(sweep.base())
    assert (row["P_tot"], row["P_act"]) == (expected["total"], expected["active"])
    assert row["flops_per_token"] == pytest.approx(expected["flops"])
    assert row["rho"] == pytest.approx(expected["rho"])
    for name in ("total", "active", "flops"):
        assert row[f"mismatch_{name}"] == pytest.approx(expected[name] / base[name] - 1)
    assert row["rows"] == 53 + 59 + 61 + 67  # the primes from 50 up, two heads of two orders
    assert row["tokens"] == 24 * 4 * 16
    assert row["tokens_per_row"] == pytest.approx(24 * 4 * 16 / 240)
    assert row["lookups_per_row"] == pytest.approx(24 * 4 * 16 * 4 / 240)  # two orders, two heads
    assert (row["seconds"], row["training_seconds"], row["cpu_seconds"]) == (100.0, 50.0, 45.0)
    assert (row["learning_rate"], row["variant"], row["axis_value"]) == (0.01, "tables", 50.0)
    # The first half of the targets have half the mean loss, the others three halves of it.
    assert row["seen_loss_2"] == pytest.approx(3.0 / 2)
    assert row["unseen_loss_2"] == pytest.approx(3.0 * 3 / 2)
    assert row["seen_loss_3"] == pytest.approx(3.0 / 2)  # the first quarter
    assert row["unseen_loss_3"] == pytest.approx(3.0 * (1 / 2 + 3) / 3)
    assert (row["seen_loss_4"], row["unseen_loss_4"]) == (None, pytest.approx(3.0))
    assert used["rows=0", 0]["tokens_per_row"] is None
    assert all(row["command"] and row["started"] and row["versions"] for row in rows)


def test_csv_and_parquet_hold_the_same(sweep):
    with (sweep.folder / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    rows = read_rows(sweep)
    assert [list(row) for row in found] == [list(row) for row in rows]
    for text, row in zip(found, rows, strict=True):
        assert {k: "" if v is None else str(v) for k, v in row.items()} == text


def test_the_report_compares_seed_by_seed(sweep):
    """Differences -0.1 and -0.2: mean -0.15, t quantile 12.706 times 0.05."""
    text = (sweep.folder / "report.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| tables, rows=50 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["0, 1", "0.01", "2.9500"]
    assert cells[4:6] == ["-0.1500", "0, 1"]
    half = 12.7062 * 0.05
    assert cells[6] == f"[{-0.15 - half:+.4f}, {-0.15 + half:+.4f}]"
    assert cells[7] == "[-0.1500, -0.1500]"  # each document's loss falls by as much
    baseline = next(x for x in text.splitlines() if x.startswith("| none, rows=0 |"))
    # Means of seeds: 2.95 of 2 tokens halved and three halves; of 3 tokens 7 / 6.
    assert "| tables, rows=50 | 1.4750 / 4.4250 | 1.4750 / 3.4417 | - / 2.9500 |" in text
    assert "| 3.1000 |" in baseline and baseline.count("| - ") == 4
    assert "rows=101,seed=1,rate=0.01 | failed: exit status 2: oh" in text
    assert "rows=101,seed=0,rate=0.01 | not finished" in text
    assert "| MoE | rows=0 | 0 | 0.02 | 3.0000 | used; edge of the rates tried |" in text
    assert "| MoE | rows=0 | 0 | 0.01 | 5.0000 |  |" in text
    assert all(row["command"] in text for row in read_rows(sweep))
    assert "another text" not in text


def test_the_page_holds_the_same_and_its_pictures(sweep):
    page = (sweep.folder / "report.html").read_text()
    assert "[-0.1500, -0.1500]" in page and "data:image/png;base64," in page
    assert (sweep.folder / "small.png").read_bytes()[:4] == b"\x89PNG"
    svg = (sweep.folder / "small.svg").read_text()
    assert "<svg" in svg
    before = (sweep.folder / "small.svg").read_bytes()
    write_report(sweep)
    assert (sweep.folder / "small.svg").read_bytes() == before


def test_runs_of_other_text_are_not_compared(tmp_path):
    """Of rows=50 one seed read the baseline's text, of rows=101 one has other held-out targets."""
    file = write_experiment(tmp_path / "small.py", tmp_path / "text")
    plan = part(experiment(file), tmp_path / "out", [], [], lambda config: None)
    for launch in plan.trials():
        finish(plan, launch, 5.0 if launch.rate == 0.02 else 3.0)
    for launch in plan.runs({"MoE": 0.01, "Engram": 0.01}):
        other = launch.name.startswith("rows=50,seed=1")
        workdir = finish(plan, launch, 2.5 if launch.seed else 2.0, digest="d2" if other else "d1")
        if launch.name.startswith("rows=101,seed=0"):
            losses = (workdir / "losses.json").read_text()
            (workdir / "losses.json").write_text(losses.replace('"targets": 600', '"targets": 601'))
    compared = {one.point.name: one for one in compare(plan, collect(plan))}
    assert [compared[name].seeds for name in ("rows=0", "rows=50", "rows=101")] == [[], [0], [1]]
    assert compared["rows=50"].difference.count == 1
    write_report(plan)
    page = (plan.folder / "report.md").read_text()
    line = next(x for x in page.splitlines() if x.startswith("| tables, rows=50 |"))
    assert line.startswith("| tables, rows=50 | 0, 1 | 0.01 | 2.2500 | +0.0000 | 0 | - |")
    told = [x for x in page.splitlines() if "read another text" in x]
    assert [x.split(" | ")[0] for x in told] == [
        "| rows=101,seed=0,rate=0.01",
        "| rows=50,seed=1,rate=0.01",
    ]


def test_trials_that_diverged_and_other_settings_are_told(tmp_path):
    file = write_experiment(tmp_path / "small.py", tmp_path / "text")

    def planned(override=lambda config: None):
        return part(experiment(file), tmp_path / "out", [], [], override)

    def longer(config):
        config.train.steps = 48

    plan = planned()
    first, second, third, fourth = plan.trials()
    finish(plan, first, 3.0)
    (finish(plan, second, 3.0) / "losses.json").unlink()
    add_attempt(plan.folder, second, {"seconds": 1.0, "why": "not finite", "diverged": True})
    finish(planned(longer), third, 2.0)
    write_report(plan)
    text = (plan.folder / "report.md").read_text()
    assert "| MoE | rows=0 | 0 | 0.01 | 3.0000 | used; edge of the rates tried |" in text
    assert "| MoE | rows=0 | 0 | 0.02 | diverged |  |" in text
    assert "| Engram | rows=50 | 0 | 0.01 | other settings |  |" in text
    assert "| Engram | rows=50 | 0 | 0.02 | not finished |  |" in text
    assert f"| {second.name} | diverged: not finite |" in text
    assert f"| {third.name} | {plan.workdir(third)}: the run there has other settings" in text
    assert f"| {fourth.name} | not finished |" in text
    three = dataclasses.replace(plan.experiment, rates={"MoE": (0.005, 0.01, 0.02), "Engram": (1,)})
    assert report._chosen(dataclasses.replace(plan, experiment=three), first) == "used"


@pytest.mark.parametrize(("log", "shown"), [(False, [0.0, 50.0]), (True, [50.0])])
def test_only_a_logarithmic_axis_leaves_zero_out(sweep, monkeypatch, log, shown):
    drawn = []

    def keep(series, *arguments, **rest):
        drawn.extend(value for one in series for value in one.x)
        return over_axis(series, *arguments, **rest)

    over_axis = figures.over_axis
    monkeypatch.setattr(figures, "over_axis", keep)
    small = dataclasses.replace(sweep.experiment, log_axis=log, column="axis_value")
    plan = dataclasses.replace(sweep, experiment=small)
    report._pictures(plan, compare(plan, collect(plan)))
    assert sorted(drawn) == shown


def test_a_commit_is_cut_and_its_changes_are_not():
    from engram_jax.lab.report import _short

    assert _short("0123456789abcdef with changes") == "0123456789ab with changes"
    assert (_short("0123456789abcdef"), _short("unknown")) == ("0123456789ab", "unknown")


def test_other_texts_are_told(tmp_path):
    file = write_experiment(tmp_path / "small.py", tmp_path / "text")
    plan = part(experiment(file), tmp_path / "out", ["rows=0"], ["0"], lambda config: None)
    assert write_report(plan) is None and not plan.folder.exists()
    first, second = plan.trials()
    finish(plan, first, 3.0, digest="one")
    finish(plan, second, 2.0, digest="two")
    write_report(plan)
    line = "rows=0,seed=0,rate=0.02 | read another text (two, 600 held-out targets) than one, 600"
    assert line in (plan.folder / "report.md").read_text()


def test_pictures_show_what_was_given():
    from engram_jax.lab.figures import Series, differences, over_axis
    from engram_jax.lab.statistics import Line

    intervals = [Interval(-0.1, -0.2, 0.05, 3), Interval(0.1, math.nan, math.nan, 1)]
    figure = differences(["a", "b"], intervals, "c")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.lines[0].get_xdata().tolist() == [-0.1, 0.1]
    segments = axes.collections[0].get_segments()
    assert np.allclose([s[:, 0] for s in segments], [[-0.2, 0.05], [0.1, 0.1]])
    series = Series("s", [100, 10], [2.0, 3.0], intervals, Line(4.0, -1.0, 0.5))
    axes = over_axis([series], "rows", log=True, baseline=("none", 3.5)).axes[0]
    assert axes.get_xscale() == "log"
    fitted, points = axes.lines[0], axes.lines[1]
    assert np.allclose(fitted.get_ydata(), [3.0, 2.0])
    assert (points.get_xdata().tolist(), points.get_ydata().tolist()) == ([10, 100], [3, 2])
    assert "R² 0.500" in axes.get_legend().texts[-1].get_text()
