"""Which runs a sweep makes, which rates it uses, and what it takes for finished."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engram_jax.config.errors import UserError
from engram_jax.lab.plan import add_attempt, attempts, part
from tests.lab.experiments import experiment, finish, write_experiment


@pytest.fixture
def plan(tmp_path):
    """plan(points, seeds) -> a part of the small experiment in an empty folder."""
    file = write_experiment(tmp_path / "small.py", tmp_path / "text")

    def make(points=(), seeds=(), override=lambda config: None):
        return part(experiment(file), tmp_path / "out", points, seeds, override)

    return make


def names(launches) -> list[str]:
    return [launch.name for launch in launches]


def test_the_trials_come_first_then_seed_by_seed(plan):
    whole = plan()
    assert names(whole.trials()) == [
        "rows=0,seed=0,rate=0.01",
        "rows=0,seed=0,rate=0.02",
        "rows=50,seed=0,rate=0.01",
        "rows=50,seed=0,rate=0.02",
    ]
    assert names(whole.runs({"MoE": 0.01, "Engram": 0.02})) == [
        "rows=0,seed=0,rate=0.01",
        "rows=50,seed=0,rate=0.02",
        "rows=101,seed=0,rate=0.02",
        "rows=0,seed=1,rate=0.01",
        "rows=50,seed=1,rate=0.02",
        "rows=101,seed=1,rate=0.02",
    ]
    assert names(whole.runs({"MoE": 0.01})) == [f"rows=0,seed={s},rate=0.01" for s in (0, 1)]


def test_a_part_tries_only_its_families_rates(plan):
    some = plan(["rows=101"], ["4", "1"])
    assert names(some.trials()) == ["rows=50,seed=0,rate=0.01", "rows=50,seed=0,rate=0.02"]
    assert names(some.runs({"Engram": 0.02})) == [
        "rows=101,seed=4,rate=0.02",
        "rows=101,seed=1,rate=0.02",
    ]


def test_a_family_with_one_rate_has_it_without_a_trial(plan):
    rates = {"MoE": (0.01,), "Engram": (0.01, 0.02)}
    whole = plan()
    one = dataclasses.replace(whole, experiment=dataclasses.replace(whole.experiment, rates=rates))
    assert names(one.trials()) == ["rows=50,seed=0,rate=0.01", "rows=50,seed=0,rate=0.02"]
    assert one.chosen_rates() == {"MoE": 0.01}
    assert names(one.runs(one.chosen_rates())) == [f"rows=0,seed={s},rate=0.01" for s in (0, 1)]


def test_a_report_is_of_the_whole_experiment(plan):
    some = plan(["rows=101"], ["4"])
    assert some.whole().points == plan().points
    assert some.whole().seeds == (0, 1, 4)
    everything = plan()
    assert everything.whole() == everything


def test_wrong_parts_are_refused(plan):
    with pytest.raises(UserError, match="no point rows=7; it has rows=0, rows=50, rows=101"):
        plan(["rows=7"])
    with pytest.raises(UserError, match="--seeds=0,one: must be whole numbers"):
        plan([], ["0", "one"])


def test_the_best_rate_of_each_family_is_chosen(plan):
    whole = plan()
    assert whole.chosen_rates() == {}
    losses = dict(zip(whole.trials(), (3.0, 2.5, 2.0, 2.25), strict=True))
    for launch, loss in losses.items():
        assert whole.losses(launch) is None
        finish(whole, launch, loss)
    assert whole.chosen_rates() == {"MoE": 0.02, "Engram": 0.01}
    assert plan(["rows=0"]).chosen_rates() == {"MoE": 0.02}


def test_a_loss_that_is_not_finite_is_never_the_best(plan):
    whole = plan()
    first, second, *_ = whole.trials()
    finish(whole, first, float("nan"))
    assert whole.chosen_rates() == {}  # nor is a rate chosen before all have been tried
    finish(whole, second, 4.0)
    assert whole.chosen_rates() == {"MoE": 0.02}


def test_no_rate_is_chosen_before_all_have_been_tried(plan):
    whole = plan()
    first, second, *_ = whole.trials()
    finish(whole, first, 3.0)
    add_attempt(whole.folder, second, {"status": 137, "why": "exit status 137: killed"})
    assert whole.chosen_rates() == {}
    assert whole.missing(first) == "" and whole.missing(second) == "failed: exit status 137: killed"


def test_a_trial_that_diverged_has_been_tried(plan):
    whole = plan()
    first, second, *_ = whole.trials()
    finish(whole, first, 3.0)
    workdir = finish(whole, second, 1.0)
    (workdir / "losses.json").unlink()
    add_attempt(whole.folder, second, {"why": "loss nan: not finite", "diverged": True})
    assert whole.chosen_rates() == {"MoE": 0.01}
    assert whole.missing(second) == "diverged: loss nan: not finite"

    def longer(config):
        config.train.steps = 48

    other = plan(override=longer)  # that is no outcome of these settings
    assert "train.steps is 24" in other.missing(second)
    (workdir / "run.json").unlink()
    assert not whole.diverged(second)


def test_losses_without_a_record_of_settings_are_no_result(plan):
    launch = plan().trials()[0]
    workdir = finish(plan(), launch, 3.0)
    assert plan().losses(launch) is not None
    (workdir / "run.json").unlink()
    assert plan().losses(launch) is None


def test_other_settings_are_no_result(plan):
    launch = plan().trials()[0]
    workdir = finish(plan(), launch, 3.0)

    def longer(config):
        config.train.steps = 48

    def larger(config):
        config.model.d_model = 32

    def slower(config):
        config.train.checkpoint_every = 5  # decides no result

    for override, key in ((longer, "train.steps is 24"), (larger, "model.d_model is 16")):
        with pytest.raises(UserError, match=f"other settings: config.{key} there"):
            plan(override=override).losses(launch)
        assert plan(override=override).chosen_rates() == {}
    assert plan(override=slower).losses(launch)["step"] == 24
    # A run that was cut after the same settings' results of fewer steps is not finished.
    found = json.loads((workdir / "losses.json").read_text())
    (workdir / "losses.json").write_text(json.dumps({**found, "step": 20}))
    assert plan().losses(launch) is None


def test_attempts_are_kept(plan, tmp_path):
    launch = plan().trials()[0]
    assert attempts(tmp_path, launch) == []
    add_attempt(tmp_path, launch, {"status": 2, "why": "no"})
    add_attempt(tmp_path, launch, {"status": 0, "why": ""})
    assert attempts(tmp_path, launch) == [{"status": 2, "why": "no"}, {"status": 0, "why": ""}]
