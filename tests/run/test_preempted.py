"""SIGTERM at the moments that random kills hardly hit: the run stops, saved, with status 0."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import pytest

from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.evaluation.held_out import Evaluator
from engram_jax.run import loop
from tests.kills import assert_same_run, complete, finished, last_step
from tests.runs import Outcome, launched, small_run


def sigterm(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def preempted(corpus, tmp_path, monkeypatch):
    """preempted(owner, name, wrap): a launch with `owner.name` replaced by wrap(the original)."""

    def start(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> str:
        handler = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrap(getattr(owner, name)))
            outcome = launched(*small_run(corpus, tmp_path))
        assert signal.getsignal(signal.SIGTERM) is handler
        return ended(outcome)

    return start


def ended(outcome: Outcome) -> str:
    """The line a notice ends with."""
    assert outcome.code == 0, outcome.err
    assert "report" not in outcome.out
    line = outcome.out.splitlines()[-1]
    assert line.startswith("SIGTERM: ") and outcome.out.count("SIGTERM") == 1
    return line


def first(original: Callable) -> Callable:
    """Two notices, then the call."""

    def call(*args, **kwargs):
        sigterm(2)
        return original(*args, **kwargs)

    return call


def afterwards(original: Callable) -> Callable:
    """The call, then two notices."""

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        sigterm(2)
        return result

    return call


def at_dispatch(steps: int) -> Callable[[Callable], Callable]:
    """Of jit_train_step: a notice when the step after `steps` updates is dispatched."""

    def wrap(jit_train_step: Callable) -> Callable:
        def build(program):
            step_fn = jit_train_step(program)

            def call(state, batch):
                if int(jax.device_get(state.step)) == steps:
                    sigterm()
                return step_fn(state, batch)

            return call

        return build

    return wrap


def test_where_there_is_nothing_to_save_yet(preempted, tmp_path):
    line = preempted(loop, "open_on_all_processes", first)
    assert line == "SIGTERM: ended where there was nothing to save; the same command goes on"
    assert not list(tmp_path.iterdir())
    line = preempted(loop.Run, "_start", afterwards)
    assert "nothing new to save; step 0" in line
    assert complete(tmp_path) == []


@pytest.mark.slow
def test_every_moment_in_one_run(preempted, corpus, tmp_path, undisturbed):
    def stopped(step: int, line: str) -> None:
        assert f"stopped, checkpoint {step} in {tmp_path}" in line
        assert complete(tmp_path)[-1] == last_step(tmp_path) == step
        assert not (tmp_path / "report.html").exists()

    stopped(1, preempted(loop, "jit_train_step", at_dispatch(0)))  # it compiles there
    stopped(12, preempted(Evaluator, "score", first))
    stopped(15, preempted(Checkpointer, "save", afterwards))
    stopped(24, preempted(loop, "jit_train_step", at_dispatch(23)))
    line = preempted(loop, "finish", first)
    assert line == "SIGTERM: ended where there was nothing to save; the same command goes on"
    finished(launched(*small_run(corpus, tmp_path)))
    assert (tmp_path / "report.html").exists()
    assert_same_run(corpus, tmp_path, undisturbed)
