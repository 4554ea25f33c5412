"""The runner with a program of a few lines in the place of training: order, locks, signals, what
is shown. With real training: tests/lab/test_sweep.py."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import threading
import time

import pytest

from engram_jax.checkpoint.run_record import add_launch
from engram_jax.checkpoint.workdir import try_lock
from engram_jax.lab import runner
from engram_jax.lab.plan import attempts, part
from engram_jax.lab.runner import Progress, State, Sweep
from engram_jax.lab.status import Screen, duration, seconds_left, summary, table
from tests.lab.experiments import experiment, write_experiment

# Ends by what the run is called; its held-out loss is its rate.
PROGRAM = """
import json, pathlib, shutil, signal, sys, time
name = sys.argv[1].partition(":")[2]
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
workdir.mkdir(exist_ok=True)
print("arguments", sys.argv[1:])
shutil.copy(workdir.parent.parent / "records" / name / "run.json", workdir)
if "rows=16" in name and name.endswith("rate=0.01"):
    print("error: step 3: loss nan, gradient norm nan on process 0: not finite; the state before"
          " this step is checkpoint 3")
    sys.exit(2)
if "rows=13" in name:
    while time.process_time() < 0.3:
        pass
    sys.exit("error: no text")
if "rows=14" in name:
    sys.exit(0)
if "rows=15" in name:
    def stop(*_):
        (workdir / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (workdir / "ready").touch()
    time.sleep(60)
loss = {"nats_per_token": {name: float(name.rpartition("=")[2])}, "targets": 5}
(workdir / "losses.json").write_text(json.dumps({"step": 24, "held_out_loss": loss}))
"""


@pytest.fixture
def make(tmp_path):
    """make(points, seeds, rows=declared) -> a Sweep of the program above, and what it has shown."""

    def sweep(points=(), seeds=("0",), rows=(0, 50, 101, 14, 13, 15, 16)):
        file = write_experiment(tmp_path / "small.py", tmp_path / "text", rows=rows)
        plan = part(experiment(file), tmp_path / "out", points, seeds, lambda config: None)
        rates = [{"MoE": rate, "Engram": rate} for rate in (0.01, 0.02)]
        for launch in (*plan.trials(), *(run for each in rates for run in plan.runs(each))):
            record = tmp_path / "records" / launch.name
            if not record.exists():  # the program leaves a copy of it, as training does
                add_launch(record, plan.config(launch), {"digest": "d"})
        stream, done = io.StringIO(), []
        command = [sys.executable, "-c", PROGRAM]
        screen = Screen(stream)
        made = Sweep(
            plan, command, "small.py", {}, show=screen.show, finished=lambda: done.append(1)
        )
        return made, stream, done

    return sweep


def test_rates_first_then_the_best_for_every_point(make):
    sweep, stream, done = make(["rows=50", "rows=101"])
    assert sweep.run()
    assert sweep.rates == {"Engram": 0.01}  # the lower loss
    begun = [x.partition(":")[0] for x in stream.getvalue().splitlines() if "step 0 of 24" in x]
    assert begun == [
        "rows=50,seed=0,rate=0.01",
        "rows=50,seed=0,rate=0.02",
        "rows=101,seed=0,rate=0.01",
    ]
    assert len(done) == 3
    assert "3 of 3 done" in stream.getvalue()
    log = (sweep.plan.folder / "logs" / "rows=101,seed=0,rate=0.01.log").read_text()
    workdir = sweep.plan.folder / "rows=101,seed=0,rate=0.01"
    assert f"['--config=small.py:{workdir.name}', '--workdir={workdir}']" in log
    again, stream, done = make(["rows=50", "rows=101"])
    assert again.run() and not done
    assert "step 0" not in stream.getvalue()


def test_what_fails_is_kept_and_the_rest_is_run(make):
    sweep, stream, done = make(["rows=13", "rows=14", "rows=50"])
    assert not sweep.run()
    failed = {n: p.why for n, p in sweep.progress.items() if p.state is State.FAILED}
    assert failed == {
        "rows=13,seed=0,rate=0.01": "exit status 1: error: no text",
        "rows=14,seed=0,rate=0.01": failed["rows=14,seed=0,rate=0.01"],
    }
    assert failed["rows=14,seed=0,rate=0.01"].startswith("exit status 0: arguments")
    assert len(done) == 2  # the two trials at rows=50, one of which is its run
    assert "rows=13,seed=0,rate=0.01: failed: exit status 1: error: no text" in stream.getvalue()
    (kept,) = attempts(sweep.plan.folder, sweep.plan.experiment.parse("rows=13,seed=0,rate=0.01"))
    assert (kept["status"], kept["why"]) == (1, "exit status 1: error: no text")
    assert 0.3 <= kept["cpu_seconds"] <= kept["seconds"] + 0.1  # of one thread
    again, *_ = make(["rows=13", "rows=50"])
    assert not again.run()  # it is tried again, once
    launch = sweep.plan.experiment.parse("rows=13,seed=0,rate=0.01")
    assert len(attempts(sweep.plan.folder, launch)) == 2


def test_a_run_whose_loss_is_not_finite_is_an_outcome(make):
    """The trial of 0.01 diverges: 0.02 is used, all is done, and it is not tried again."""
    sweep, stream, _ = make(["rows=16"], rows=(0, 16))
    assert sweep.run()
    assert sweep.rates == {"Engram": 0.02}
    first, second = sweep.plan.trials()
    assert [sweep.of(launch).state for launch in (first, second)] == [State.DIVERGED, State.DONE]
    assert f"{first.name}: diverged: error: step 3: loss nan" in stream.getvalue()
    assert "1 of 2 done, 1 diverged" in stream.getvalue()
    assert sweep.plan.diverged(first) and not sweep.plan.diverged(second)
    again, stream, _ = make(["rows=16"], rows=(0, 16))
    assert again.run() and "step 0" not in stream.getvalue()
    assert len(attempts(sweep.plan.folder, first)) == 1


def test_other_settings_fail_that_run_alone(make, monkeypatch):
    """Where they are found out only once its lock is held, and once its process has ended."""
    sweep, *_ = make(["rows=50", "rows=101"])
    first, second = sweep.plan.trials()
    sweep.progress[first.name] = Progress(State.DONE, loss=1.0)
    other = sweep.plan.folder.parent / "records" / second.name
    shutil.rmtree(other)
    add_launch(other, sweep.plan.config(first), {"digest": "d"})  # the other rate's
    assert not sweep.run()
    failed = sweep.of(second)
    assert failed.state is State.FAILED and "optimizer.peak_lr is 0.01" in failed.why
    before = runner.Sweep._look
    monkeypatch.setattr(runner.Sweep, "_look", lambda self, launch: None)
    again, *_ = make(["rows=50"])
    again._take(second)
    monkeypatch.setattr(runner.Sweep, "_look", before)
    assert again.of(second).state is State.FAILED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_the_sweep(make, number):
    sweep, _stream, _ = make(["rows=15", "rows=101"])
    running = sweep.plan.folder / "rows=15,seed=0,rate=0.01"

    def interrupt():
        while not (running / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not sweep.run()
    thread.join()
    assert (running / "saved").exists()  # it had SIGTERM, and the time to save
    assert sweep.of(sweep.plan.experiment.parse(running.name)).state is State.OPEN
    assert not (sweep.plan.folder / "rows=101,seed=0,rate=0.01").exists()
    assert signal.getsignal(number) is before


def test_a_run_that_another_sweep_has_is_waited_for(make, monkeypatch):
    monkeypatch.setattr(runner, "_WAIT", 0.1)
    sweep, stream, done = make(["rows=50"])
    first, second = sweep.plan.trials()
    (sweep.plan.folder / "locks").mkdir(parents=True)
    lock = try_lock(sweep.plan.folder / "locks" / first.name)
    assert lock is not None

    def other():
        while f"{second.name}: done" not in stream.getvalue():
            time.sleep(0.01)
        workdir = sweep.plan.workdir(first)
        workdir.mkdir()
        losses = '{"step": 24, "held_out_loss": {"nats_per_token": {"x": 0.5}, "targets": 5}}'
        shutil.copy(workdir.parent.parent / "records" / first.name / "run.json", workdir)
        (workdir / "losses.json").write_text(losses)
        lock.close()

    thread = threading.Thread(target=other)
    thread.start()
    assert sweep.run()
    thread.join()
    assert f"{first.name}: running elsewhere" in stream.getvalue()
    assert sweep.rates == {"Engram": 0.02}  # 0.02 < the other's 0.5
    assert len(done) == 1


def test_while_another_tries_rates_the_families_that_have_theirs_run(make, monkeypatch):
    monkeypatch.setattr(runner, "_WAIT", 0.1)
    sweep, stream, _ = make(["rows=0", "rows=50"], ["0", "1"])
    waits = sweep.plan.trials()[-1]
    assert waits.point.family == "Engram"
    (sweep.plan.folder / "locks").mkdir(parents=True)
    lock = try_lock(sweep.plan.folder / "locks" / waits.name)
    assert lock is not None
    shown = []

    def other():  # it ends when nothing is left to do without it
        while "rows=0,seed=1,rate=0.01: done" not in stream.getvalue():
            time.sleep(0.01)
        shown.append(stream.getvalue())
        lock.close()

    thread = threading.Thread(target=other)
    thread.start()
    assert sweep.run()
    thread.join()
    assert sweep.rates == {"MoE": 0.01, "Engram": 0.01}
    assert "rows=50,seed=1" not in shown[0]


def test_the_process_that_trains_holds_the_lock(make):
    """So a sweep that is killed leaves it locked until its process has ended, too."""
    sweep, *_ = make(["rows=15"])
    launch = sweep.plan.experiment.parse("rows=15,seed=0,rate=0.01")
    (sweep.plan.folder / "locks").mkdir(parents=True)
    (sweep.plan.folder / "logs").mkdir()
    path = sweep.plan.folder / "locks" / launch.name
    free = []

    def watch():
        while not (sweep.plan.workdir(launch) / "ready").exists():
            time.sleep(0.01)
        lock.close()  # the sweep's own
        free.append(try_lock(path))
        sweep.stopping = True
        sweep._process.terminate()

    lock = sweep._lock(launch)
    thread = threading.Thread(target=watch)
    thread.start()
    sweep._train(launch, lock)
    thread.join()
    assert free == [None]
    assert try_lock(path) is not None


def test_time_left_is_that_of_the_runs_so_far(make):
    sweep, *_ = make(["rows=0", "rows=50", "rows=101"], ["0", "1"])
    assert seconds_left(sweep) is None
    trials = sweep.plan.trials()
    sweep.progress[trials[0].name] = Progress(State.RUNNING, step=6, steps=24, seconds=30)
    # Four trials, two of which are runs, too: 8 processes of 120 seconds, 30 of them spent.
    assert seconds_left(sweep) == pytest.approx(8 * 120 - 30)
    sweep.progress[trials[0].name] = Progress(State.DONE, loss=3.0, seconds=100)
    sweep.progress[trials[1].name] = Progress(State.FAILED, why="no", seconds=5)
    sweep.progress[trials[2].name] = Progress(State.RUNNING, step=1, steps=24, seconds=20)
    assert seconds_left(sweep) == pytest.approx(6 * 100 - 20)
    assert summary(sweep) == "1 of 8 done, 1 failed, about 9:40 left"
    assert table(sweep, 24) == [
        f"{trials[0].name}: done, held-out loss 3.0000, 1:40",
        f"{trials[1].name}: failed: no, 0:05",
        f"{trials[2].name}: step 1 of 24, 0:20",
        "learning rates: being tried",
        "1 of 8 done, 1 failed, about 9:40 left",
    ]
    assert table(sweep, 4)[0] == f"{trials[1].name}: failed: no, 0:05"
    assert (duration(59.6), duration(3601)) == ("1:00", "1:00:01")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_drawn_again_in_place(make):
    sweep, *_ = make(["rows=50"])
    stream = Terminal()
    screen = Screen(stream)
    screen.show(sweep)
    sweep.progress["rows=50,seed=0,rate=0.01"] = Progress(State.DONE, loss=3.0, seconds=100)
    screen.show(sweep)
    screen.show(sweep)
    parts = stream.getvalue().split("\x1b[J")
    assert parts[0].endswith("\x1b[2F") and parts[1].endswith("\x1b[3F")
    assert parts[2] == parts[1].removesuffix("\x1b[3F")
