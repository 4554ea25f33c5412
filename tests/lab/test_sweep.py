"""--mode=sweep as a user starts it: refusals, and a sweep of real runs, killed and resumed."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from engram_jax.lab.plan import part
from engram_jax.lab.sweep import KEPT
from tests.kills import assert_same_run, last_step, launches
from tests.lab.experiments import experiment, finish, sweep_process, write_experiment
from tests.runs import ROOT, TINY, environment, launched, refused, write_corpus

ALLOCATION = f"--config={ROOT / 'configs/experiments/allocation.py'}"
COMPONENTS = f"--config={ROOT / 'configs/experiments/components.py'}"
CONTROLS = ("--points=variant=engram,variant=frozen", "--seeds=0")
SWEEP = (ALLOCATION, "--mode=sweep")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((TINY, "--mode=sweep"), "engram_tiny.py: declares no EXPERIMENT"),
        ((f"{ALLOCATION}:rho=0.8", "--mode=sweep"), "a sweep takes the file alone"),
        ((*SWEEP, "--points=width=3"), "no point width=3; it has rho=1, rho=0.9"),
        ((*SWEEP, "--points=rho=0.99"), "rho = 0.99: must be from 0.000 to 0.947"),
        ((*SWEEP, "--seeds=first"), "--seeds=first: must be whole numbers"),
        ((*SWEEP, "--config.data.batch_size=0"), "config.data.batch_size = 0: must be positive"),
        ((*SWEEP, "--config.name=x"), "--config.name=x: not for --mode=sweep, which names its"),
        (
            (*SWEEP, "--config.train.seed=7"),
            "not for --mode=sweep, whose seeds are named by --seeds",
        ),
        (
            (*SWEEP, "--config.data.seed=7"),
            "not for --mode=sweep, whose seeds are named by --seeds",
        ),
        (
            (*SWEEP, "--config.optimizer.peak_lr=0.1"),
            "--config.optimizer.peak_lr=0.1: not for --mode=sweep, which tries the",
        ),
        (
            (*SWEEP, "--config.model.d_model=64"),
            "--config.model.d_model=64: not for --mode=sweep, whose sizes are solved",
        ),
        ((*SWEEP, "--config.tokenizer.vocab_size=512"), "whose sizes are solved for equal budgets"),
        (
            (COMPONENTS, "--mode=sweep", *CONTROLS, "--config.optimizer.memory_optimizer=frozen"),
            "--config.optimizer.memory_optimizer=frozen: not for --mode=sweep, whose points differ",
        ),
        ((*SWEEP, "--workdir=/proc/x"), "/proc cannot be written to"),
        ((*SWEEP, "--json"), "--json: only for --mode=describe"),
        ((*SWEEP, "--coordinator_address=a:1"), "--coordinator_address: not for --mode=sweep"),
        ((ALLOCATION, "--points=rho=1"), "--points: only for --mode=sweep"),
        ((ALLOCATION, "--seeds=1", "--mode=describe"), "--seeds: only for --mode=sweep"),
        ((ALLOCATION, "--report_only"), "--report_only: only for --mode=sweep"),
    ],
)
def test_what_a_sweep_refuses(arguments, words, tmp_path):
    workdir = () if any("--workdir" in a for a in arguments) else (f"--workdir={tmp_path / 'out'}",)
    refused(launched(*arguments, *workdir), words)
    assert not (tmp_path / "out").exists()


def test_a_report_of_what_is_there(tmp_path):
    file = write_experiment(tmp_path / "small.py", tmp_path / "text")
    arguments = ("--mode=sweep", f"--config={file}", f"--workdir={tmp_path / 'out'}")
    nothing = launched(*arguments, "--report_only")
    assert (nothing.code, nothing.err) == (1, "")
    assert nothing.out == f"no run in {tmp_path / 'out'} is finished: no report\n"
    steps = "--config.train.steps=30"
    plan = part(experiment(file), tmp_path / "out", [], [], lambda config: None)
    finish(plan, plan.trials()[0], 3.0)
    found = launched(*arguments, "--report_only")
    assert (found.code, found.out) == (0, f"report: {tmp_path / 'out' / 'report.html'}\n")
    # With other settings that run is no result.
    other = launched(*arguments, "--report_only", steps)
    none, reason = other.out.splitlines()
    assert other.code == 1 and none.startswith("no run in")
    assert "other settings: config.train.steps is 24 there and 30 here" in reason


def until(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_rate_that_diverges_is_an_outcome(tmp_path):
    corpus = write_corpus(tmp_path / "text")
    file = write_experiment(tmp_path / "small.py", corpus, rows=(0, 101))
    file.write_text(file.read_text().replace('"MoE": (0.01, 0.02)', '"MoE": (0.01, 1e30)'))
    arguments = (file, tmp_path / "out", "--seeds=0", "--points=rows=0")
    for started in (True, False):
        process = sweep_process(*arguments)
        text, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
        assert "1 of 2 done, 1 diverged" in text.splitlines()[-2]
        assert ("step 0 of" in text) is started
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| MoE | rows=0 | 0 | 1e+30 | diverged |  |" in page


@pytest.mark.slow
def test_a_sweep_that_is_stopped_killed_and_resumed(tmp_path):
    """SIGTERM in one run, SIGKILL in the next, one that fails: every other is finished, none is
    trained twice, and its printed command gives the same bits."""
    corpus = write_corpus(tmp_path / "text")
    steps = {"train__steps": 900, "train__eval_every": 450, "train__checkpoint_every": 30}
    file = write_experiment(tmp_path / "small.py", corpus, rows=(0, 101, 13), **steps)
    out = tmp_path / "out"
    first, second = out / "rows=0,seed=0,rate=0.01", out / "rows=0,seed=0,rate=0.02"
    start = (file, out, "--seeds=0", "--config.train.keep=2")

    stopped = sweep_process(*start)
    until(lambda: last_step(first) > 40, stopped)
    stopped.send_signal(signal.SIGTERM)
    text, errors = stopped.communicate(timeout=300)
    assert (stopped.returncode, errors) == (1, "")
    of_all, told, of_report = text.splitlines()[-3:]
    assert "0 of 5 done" in of_all and told == f"stopped; {KEPT}"
    assert of_report.startswith(f"no run in {out} is finished")
    log = out / "logs" / f"{first.name}.log"
    assert f"SIGTERM: stopped, checkpoint {last_step(first)}" in log.read_text()
    assert not second.exists()

    killed = sweep_process(*start)
    until(lambda: last_step(second) > 40, killed)
    killed.kill()
    killed.communicate()

    done = sweep_process(*start)
    text, errors = done.communicate(timeout=600)
    assert (done.returncode, errors) == (1, "")
    assert "rows=13,seed=0" in text and "/none/such" in text
    assert "4 of 5 done, 1 failed" in text.splitlines()[-2]
    assert [launch["resumed_at"] > 0 for launch in launches(first)] == [False, True]
    assert len(launches(second)) == 1  # its process went on alone, and was waited for

    again = sweep_process(*start, "--points=rows=0,rows=101")
    text, errors = again.communicate(timeout=300)
    assert (again.returncode, errors) == (0, "")
    assert "step 0 of" not in text and len(launches(first)) == 2

    ours = out / "rows=101,seed=0,rate=0.01"
    command = launches(ours)[0]["command"].split()
    assert command[-2] == "--config.train.keep=2"
    elsewhere = [*command[:-1], f"--workdir={tmp_path / 'alone'}"]
    subprocess.run(elsewhere, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert_same_run(corpus, tmp_path / "alone", ours)
    page = (out / "report.md").read_text()
    assert "rows=13,seed=0" in page and "failed: exit status 2" in page
    assert "python " + launches(ours)[0]["command"].split(maxsplit=1)[1] in page
