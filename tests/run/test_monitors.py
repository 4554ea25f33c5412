"""What a launch shows of itself: the trace of a few steps, and the stack of one that hangs."""

from __future__ import annotations

import shutil
import socket
import time

import jax
import pytest

from engram_jax import data
from tests.kills import assert_same_run, finished
from tests.runs import launched, run_process, small_run


def recorded_steps(folder) -> list[int]:
    """Step numbers of the training steps in the trace, as the loop annotates them."""
    (file,) = folder.rglob("*.xplane.pb")
    return sorted(
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )


@pytest.fixture
def blocked_once(monkeypatch):
    """The iterator stands still before the batch of step 6, until the hang is reported."""
    seconds = 2.5
    get_next = data.TrainIterator.__next__
    calls = [0]

    def standing_still(iterator):
        calls[0] += 1
        if calls[0] == 6:
            time.sleep(seconds)
        return get_next(iterator)

    monkeypatch.setattr(data.TrainIterator, "__next__", standing_still)


@pytest.mark.slow
def test_a_profile_has_its_steps_and_no_others(corpus, tmp_path, undisturbed):
    """In a process of its own: JAX's profiler crashes where libtpu is loaded and no TPU is there,
    as the tests of aot/ do."""
    outcome = finished(run_process(*small_run(corpus, tmp_path), "--profile=10:13"))
    assert recorded_steps(tmp_path / "profile") == [10, 11, 12]
    assert f"profile: {tmp_path / 'profile'}" in outcome.out
    assert_same_run(corpus, tmp_path, undisturbed)


def test_a_hang_is_reported(corpus, tmp_path, undisturbed, blocked_once, capfd):
    outcome = finished(launched(*small_run(corpus, tmp_path, train__hang_seconds=0.5)))
    assert_same_run(corpus, tmp_path, undisturbed)
    # Step 5 is dispatched, and read after the next; so step 4 was the last to be seen.
    lines = [x for x in outcome.err.splitlines() if "the last was step 4, now training" in x]
    where = f"hang: process 0 of 1 on host {socket.gethostname()}: no step has ended for "
    assert lines and all(x.startswith(where) for x in lines)
    assert "in standing_still" in outcome.err + capfd.readouterr().err


def test_a_window_that_lies_behind_is_said_and_not_recorded(corpus, undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    outcome = finished(launched(*small_run(corpus, workdir), "--profile=10:13"))
    assert "--profile: steps 10 to 13 are done; nothing is recorded" in outcome.out
    assert not (workdir / "profile").exists()
