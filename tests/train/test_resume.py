"""Kill -9 at any moment, and the same command continues: same losses and state, bit for bit.

And the runs that must not continue: with other addresses, from a damaged checkpoint, after a step
that is not finite.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax import provenance
from engram_jax.checkpoint import Checkpointer
from engram_jax.metrics import read_metrics
from engram_jax.run_data import open_data
from engram_jax.train_state import TrainState, abstract_state, build_program
from tests.runs import ROOT, SMALL, Outcome, launched, small_config, small_run

STEPS = SMALL["train.steps"]
TIMED = {"time", "step_seconds", "tokens_per_second"}


def start(corpus: Path, workdir: Path, **overrides) -> subprocess.Popen:
    """The same command as a process of its own, which finds the programs that we compiled."""
    compiled = jax.config.jax_compilation_cache_dir or f"{corpus}-cache/compiled"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *small_run(corpus, workdir, **overrides)],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": compiled},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_when(
    process: subprocess.Popen,
    condition: Callable[[], bool],
    number: signal.Signals = signal.SIGKILL,
) -> str:
    """Send the signal once `condition()` holds; returns what the process wrote to its last moment.

    Fails if the process ended by itself before.
    """
    while process.poll() is None and not condition():
        time.sleep(0.001)  # files are watched: there is nothing to wait for
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, 2), err
    return err


def last_step(workdir: Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    return max((record["step"] for record in read_metrics(workdir)), default=0)


def complete(workdir: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def launches(workdir: Path) -> list[dict]:
    return provenance.read(workdir / "run.json") if (workdir / "run.json").exists() else []


def starting(workdir: Path, rng: random.Random) -> Callable[[], bool]:
    """Some time in the first seconds: imports, restoring, compiling."""
    end = time.monotonic() + rng.uniform(0, 5)
    return lambda: time.monotonic() > end


def stepping(workdir: Path, rng: random.Random) -> Callable[[], bool]:
    """Some steps behind the last checkpoint, where others may have been before."""
    target = max(complete(workdir), default=0) + rng.randint(1, 8)
    begun = has_begun(workdir)
    return lambda: begun() and last_step(workdir) >= target


def saving(workdir: Path, rng: random.Random) -> Callable[[], bool]:
    """While a checkpoint is written, up to two later than the last."""
    begun, folder = has_begun(workdir), workdir / "checkpoints"
    last = max(complete(workdir), default=0) + rng.choice([0, 3, 6])

    def condition() -> bool:
        # What others left unfinished is removed before a launch counts as begun.
        return (
            begun()
            and max(complete(workdir), default=0) >= last
            and any("tmp" in path.name for path in folder.iterdir())
        )

    return condition


def has_begun(workdir: Path) -> Callable[[], bool]:
    """Whether the next launch has got as far as its first step."""
    earlier = len(launches(workdir))
    return lambda: len(launches(workdir)) > earlier


def final_state(corpus: Path, workdir: Path, step: int | None = None, **overrides) -> TrainState:
    config = small_config(corpus, **overrides)
    data = open_data(config, log=lambda line: None)
    program = build_program(config, data.addressing)
    with Checkpointer(workdir, addressing=data.addressing, read_only=True) as checkpointer:
        return checkpointer.restore(step, abstract_state(program)).state


def assert_same_run(corpus: Path, workdir: Path, expected: Path) -> None:
    """Every logged number but times, and every array of the final checkpoint: parameters, router
    biases, tables, all moments."""
    ours, theirs = read_metrics(workdir), read_metrics(expected)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine) - TIMED == set(other) - TIMED
        for name in set(mine) - TIMED:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=f"{name} {mine['step']}")
    assert complete(workdir) == complete(expected)
    found, wanted = final_state(corpus, workdir), final_state(corpus, expected)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert int(found.step) == complete(workdir)[-1]


def finished(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_run_killed_twice_equals_the_undisturbed_run(corpus, undisturbed, tmp_path):
    """Once right after the first checkpoint is complete, once while a later one is written."""
    signal_when(start(corpus, tmp_path), (tmp_path / "checkpoints" / "3").is_dir)
    assert 3 <= last_step(tmp_path) < STEPS
    signal_when(start(corpus, tmp_path), saving(tmp_path, random.Random(0)))
    outcome = finished(launched(*small_run(corpus, tmp_path)))
    assert f"resumed from step {launches(tmp_path)[-1]['resumed_at']}" in outcome.out
    assert_same_run(corpus, tmp_path, undisturbed)
    resumed_at = [launch["resumed_at"] for launch in launches(tmp_path)]
    assert resumed_at == sorted(resumed_at)
    assert resumed_at[0] == 0 and resumed_at[1] >= 3


@pytest.mark.slow
def test_twenty_kills(corpus, tmp_path):
    """At random moments of every kind: importing and compiling, stepping, evaluating, saving."""
    long = {"train__steps": 180, "train__eval_every": 12, "optimizer__peak_lr": 3e-3}
    expected = tmp_path / "undisturbed"
    finished(launched(*small_run(corpus, expected, **long)))
    workdir, rng = tmp_path / "run", random.Random(0)
    for moment in rng.choices([starting, stepping, saving], [1, 2, 2], k=20):
        signal_when(start(corpus, workdir, **long), moment(workdir, rng))
    assert 20 < complete(workdir)[-1] < 180
    finished(launched(*small_run(corpus, workdir, **long)))
    assert_same_run(corpus, workdir, expected)


@pytest.mark.slow
@pytest.mark.proof
def test_control_c_ends_in_one_line_and_resumes(corpus, undisturbed, tmp_path):
    process = start(corpus, tmp_path)
    err = signal_when(process, lambda: last_step(tmp_path) >= 4, signal.SIGINT)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("error: interrupted; the same command goes on")
    assert "Traceback" not in err
    finished(launched(*small_run(corpus, tmp_path)))
    assert_same_run(corpus, tmp_path, undisturbed)


def copy_of(workdir: Path, target: Path) -> Path:
    return Path(shutil.copytree(workdir, target / "run"))


def contents(workdir: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


def test_a_finished_run_stays_as_it_is(corpus, undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    finished(launched(*small_run(corpus, workdir)))
    assert_same_run(corpus, workdir, undisturbed)
    lines = [(folder / "metrics.jsonl").read_text() for folder in (workdir, undisturbed)]
    assert lines[0] == lines[1]
    assert [launch["resumed_at"] for launch in launches(workdir)] == [0, STEPS]


def refused(outcome: Outcome, *words: str) -> str:
    """One line at the end of standard error; returns it."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize(
    "change",
    [
        {"model__engram__seed": 1},
        {"model__engram__rows_per_head": 103},
        {"model__engram__orders": (2,), "model__engram__heads_per_order": 4},
        {"tokenizer__vocab_size": 280},  # another tokenizer is trained
        {"tokenizer__pad_id": 5},
    ],
    ids=str,
)
def test_other_addresses_are_refused_with_both_fingerprints(corpus, undisturbed, change, tmp_path):
    stored = json.loads((undisturbed / "addressing" / "addressing.json").read_text())
    before = contents(undisturbed)
    for mode in ("--mode=train", "--mode=evaluate"):
        line = refused(launched(*small_run(corpus, undisturbed, **change), mode))
        if "tokenizer__vocab_size" in change and mode == "--mode=evaluate":
            continue  # its tokenizer was refused before
        found = re.findall(r"\b[0-9a-f]{64}\b", line)
        assert len(set(found)) == 2
        assert stored["fingerprint"] in found
    assert contents(undisturbed) == before


def test_other_data_settings_are_refused(corpus, undisturbed):
    """Else the run would go on at another place of another stream of batches."""
    before = contents(undisturbed)
    for change in ({"data__batch_size": 2}, {"data__seq_len": 8}, {"data__seed": 9}):
        key, value = next(iter(change.items()))
        line = refused(launched(*small_run(corpus, undisturbed, train__steps=STEPS + 3, **change)))
        assert key.removeprefix("data__") in line and str(value) in line
    assert contents(undisturbed) == before


def test_another_tokenizer_is_not_scored(corpus, undisturbed, tmp_path):
    """Whether or not the model has tables that would notice."""
    workdir = copy_of(undisturbed, tmp_path)
    file = workdir / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = dict(
        zip(
            tokenizer["model"]["vocab"], reversed(tokenizer["model"]["vocab"].values()), strict=True
        )
    )
    file.write_text(json.dumps(tokenizer))
    line = refused(launched(*small_run(corpus, workdir), "--mode=evaluate"), "tokenizer")
    assert f"config.tokenizer.path={file}" in line


def test_a_truncated_checkpoint_is_named_and_the_one_before_serves(corpus, undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    checkpoint = workdir / "checkpoints" / str(STEPS)
    largest = max((checkpoint / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    for mode in ("--mode=train", "--mode=evaluate", "--mode=generate"):
        outcome = launched(*small_run(corpus, workdir), mode, "--prompt=document")
        name = str(largest.relative_to(checkpoint))
        refused(outcome, str(checkpoint), name, "complete checkpoints beside it", "18, 21")
    shutil.rmtree(checkpoint)
    outcome = finished(launched(*small_run(corpus, workdir)))
    assert "resumed from step 21" in outcome.out
    assert_same_run(corpus, workdir, undisturbed)


def test_a_step_that_is_not_finite_stops_the_run(corpus, undisturbed, tmp_path):
    """A learning rate of 1e30: the first update ruins the parameters, the second step shows it."""
    ruinous = {"optimizer__peak_lr": 1e30}
    config = small_config(corpus, **ruinous)
    for _ in range(2):  # the same command stops at the same place, with the same words
        outcome = launched(*small_run(corpus, tmp_path, **ruinous))
        line = refused(outcome, "step 1: loss nan", "not finite", f"checkpoint 1 in {tmp_path}")
        assert complete(tmp_path) == [1]
        assert last_step(tmp_path) == 1
    assert "bad_batch_step_1.npz" in line

    state = final_state(corpus, tmp_path, **ruinous)  # as it was before the bad step
    assert int(state.step) == 1 and not state.halted
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    iterator = open_data(config, log=lambda line: None).train_iterator()
    batches = [next(iterator), next(iterator)]
    with np.load(tmp_path / "bad_batch_step_1.npz") as kept:
        assert set(kept) == set(batches[1])
        for name in kept:
            np.testing.assert_array_equal(kept[name], batches[1][name])

    shutil.rmtree(tmp_path / "checkpoints" / "1")  # mended: begin anew with a sane rate
    finished(launched(*small_run(corpus, tmp_path)))
    assert_same_run(corpus, tmp_path, undisturbed)
