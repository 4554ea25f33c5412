"""Kill a run at any moment, and the same command continues: same losses and state, bit for bit."""

from __future__ import annotations

import random
import signal

import pytest

from engram_jax.monitoring import goodput
from tests.kills import (
    assert_same_run,
    being_written,
    campaign,
    complete,
    finished,
    last_step,
    launches,
    saving,
    signal_when,
    start,
    stepping,
)
from tests.runs import SMALL, launched, small_run

LONG = {"train__steps": 180, "train__eval_every": 12, "optimizer__peak_lr": 3e-3}


def test_a_run_killed_twice_equals_the_undisturbed_run(corpus, undisturbed, tmp_path):
    """By a notice (repeated) between two checkpoints, and by force while one is written."""
    rng = random.Random(0)
    noticed = signal_when(
        start(corpus, tmp_path), stepping(tmp_path, rng), signal.SIGTERM, again=True
    )
    stopped = complete(tmp_path)[-1]
    assert last_step(tmp_path) == stopped < SMALL["train.steps"]
    line = f"SIGTERM: stopped, checkpoint {stopped} in {tmp_path}; the same command goes on"
    assert noticed.out.splitlines()[-1] == line
    assert not (tmp_path / "report.html").exists()
    assert not being_written(tmp_path)

    signal_when(start(corpus, tmp_path), saving(tmp_path, rng))
    assert being_written(tmp_path)
    whole = complete(tmp_path)[-1]

    outcome = finished(launched(*small_run(corpus, tmp_path)))
    assert f"resumed from step {whole} in" in outcome.out
    assert [launch["resumed_at"] for launch in launches(tmp_path)] == [0, stopped, whole]
    assert_same_run(corpus, tmp_path, undisturbed)
    spent = goodput.read(tmp_path)
    assert [launch["resumed_at"] for launch in spent] == [0, stopped, whole]
    # What the second launch did after its last whole checkpoint was lost; the third did all.
    assert max(map(int, spent[1]["saved"]), default=whole) <= whole
    assert 0 < spent[2]["training_seconds"] < spent[2]["seconds"]


@pytest.mark.slow
def test_twenty_kills(corpus, tmp_path):
    """SIGKILL and SIGTERM, at random moments of every kind."""
    expected, workdir = tmp_path / "undisturbed", tmp_path / "run"
    finished(launched(*small_run(corpus, expected, **LONG)))
    kills = list(campaign(corpus, workdir, 20, random.Random(0), **LONG))
    assert sum(kill.within_save for kill in kills) >= 3
    assert {kill.signal for kill in kills} == {"SIGKILL", "SIGTERM"}
    assert 20 < complete(workdir)[-1] < LONG["train__steps"]
    finished(launched(*small_run(corpus, workdir, **LONG)))
    assert_same_run(corpus, workdir, expected)
