"""A run with every switch of the trainer on, as a user starts it, and what is done with it then."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from engram_jax.checkpoint.load_model import load_model
from engram_jax.config import ServeConfig
from engram_jax.evaluation.held_out import Evaluator, open_checkpoint
from engram_jax.monitoring.metrics import read_metrics
from tests.kills import finished
from tests.run.test_resume import copy_of
from tests.runs import launched, refused, small_config, small_run

SWITCHES = {
    "optimizer__schedule": "wsd",
    "optimizer__decay_steps": 6,
    "optimizer__decay_shape": "sqrt",
    "optimizer__min_rate": 0.1,
    "train__ema_decay": 0.9,
    "train__trainable": ("!embedding",),
    "train__z_loss": 1e-3,
    "train__log_norms": True,
    "train__log_activations": True,
    "train__count_models": False,
}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("switches")
    finished(launched(*small_run(corpus, workdir, **SWITCHES)))
    return workdir


@pytest.mark.slow
def test_what_it_logs(run):
    records = read_metrics(run)
    steps = [r for r in records if "loss" in r]
    assert len(steps) == 24 and all(r["z_loss"] > 0 for r in steps)
    names = set(steps[-1])
    assert {"grad_norm/attention", "param_norm/embedding", "param_norm/experts"} <= names
    assert "grad_norm/embedding" not in names
    assert {"stream_rms/0", "stream_kurtosis/1", "memory_rms/1"} <= names
    (first, last) = (r for r in records if "validation_loss" in r)
    assert first["validation_loss_ema"] != first["validation_loss"]
    assert np.isfinite(last["validation_loss_ema"])
    rates = [r["learning_rate"] for r in steps]
    assert rates[1:19] == [np.float32(0.01)] * 18 and rates[-1] < 0.002


@pytest.mark.slow
def test_it_is_evaluated_and_read_with_its_average(corpus, run):
    def evaluated(*more: str) -> dict:
        arguments = (f"--workdir={run}", "--mode=evaluate", "--json", *more)
        return json.loads(finished(launched(*arguments)).out)

    plain, average = evaluated(), evaluated("--config.serve.ema=true")
    assert "ema_decay" not in plain and average["ema_decay"] == 0.9
    assert abs(plain["held_out_loss"] - average["held_out_loss"]) > 1e-4
    assert "documents" in plain and "documents" not in average
    own = small_config(corpus, **SWITCHES)
    found = open_checkpoint(small_config(corpus, **SWITCHES, serve__ema=True), run, "24")
    expected = Evaluator(found.program, found.data).score(found.state).loss
    assert average["held_out_loss"] == pytest.approx(expected, rel=1e-6)
    # What generates and serves reads the same parameters.
    for ema, state in ((True, found.state), (False, open_checkpoint(own, run, "24").state)):
        weights = load_model(dataclasses.replace(own, serve=ServeConfig(ema=ema)), run).weights
        jax.tree.map(np.testing.assert_array_equal, weights.params, state.params)
    generate = ("--mode=generate", "--prompt=document", "--config.generate.max_tokens=5")
    assert finished(launched(f"--workdir={run}", *generate, "--config.serve.ema=true")).out
    for mode in (("--tasks",), ("--neighbours=knn",)):
        refused(launched(f"--workdir={run}", "--mode=evaluate", *mode, "--config.serve.ema=true"))
    off = ("--neighbours=knn", "--config.serve.off_layers=(1,)")
    refused(launched(f"--workdir={run}", "--mode=evaluate", *off), "off_layers and off_orders: not")


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_with_nothing_else(corpus, run, tmp_path):
    part = copy_of(run, tmp_path)
    shutil.rmtree(part / "checkpoints" / "24")
    for key, told in (
        ("train.ema_decay=0", "keeps another state: config.train.ema_decay is 0.9 there"),
        ("train.trainable=('engrams',)", "keeps another state: config.train.trainable is"),
        ("optimizer.memory_optimizer=frozen", "keeps another state: config.optimizer.memory_opt"),
    ):
        change = (f"--config.{key}", "--accept_changes=train,optimizer")
        line = refused(launched(*small_run(corpus, part, **SWITCHES), *change), told)
        assert f"--config.train.init_from={part}" in line
    finished(launched(f"--workdir={part}"))
    ours, theirs = ([r["loss"] for r in read_metrics(w) if "loss" in r] for w in (part, run))
    assert ours == theirs
    # More steps: a stable phase goes on, a decay that has begun does not.
    line = refused(launched(*small_run(corpus, part, **SWITCHES, train__steps=40)))
    assert "the learning rate decays over steps 34 to 40 instead of 18 to 24; at step 24" in line
