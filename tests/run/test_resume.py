"""Runs that end and go on, and those that must not: with other addresses or data, from a damaged
checkpoint, after a step that is not finite. Killed runs are in test_kills.py.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.data.run_data import open_data
from engram_jax.data.train_bpe import train_bpe
from tests.kills import (
    assert_same_run,
    complete,
    final_state,
    finished,
    last_step,
    launches,
    signal_when,
    start,
)
from tests.runs import SMALL, Outcome, in_mode, launched, small_config, small_run

STEPS = SMALL["train.steps"]


@pytest.mark.slow
def test_control_c_is_treated_as_sigterm_is(corpus, undisturbed, tmp_path):
    process = start(corpus, tmp_path)
    outcome = signal_when(process, lambda: last_step(tmp_path) >= 4, signal.SIGINT)
    assert outcome.out.splitlines()[-1].startswith("SIGINT: stopped, checkpoint ")
    assert "Traceback" not in outcome.err
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
    accept = "--accept_changes=model,tokenizer,train"  # the settings: see test_settings.py
    change = change | {"train__steps": STEPS + 1}  # a finished run takes none
    for mode in ("--mode=train", "--mode=evaluate"):
        line = refused(launched(*small_run(corpus, undisturbed, **change), mode, accept))
        if "tokenizer__vocab_size" in change:  # the tokenizer is refused before
            wanted = "set config.tokenizer.path=", f"{undisturbed / 'tokenizer.json'}"
            assert all(words in line for words in wanted)
            continue
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


def test_another_tokenizer_is_told_by_the_key(corpus, undisturbed, tmp_path):
    """Not by two hashes, nor after the network is built."""
    other = tmp_path / "other.json"
    train_bpe(iter(["one two three two three " * 9]), 290).save(str(other))
    arguments = small_run(corpus, undisturbed, train__steps=STEPS + 1, tokenizer__path=other)
    line = refused(launched(*arguments, "--accept_changes=train.steps"))
    assert f"--workdir={undisturbed}: the run there was trained with another tokenizer" in line
    assert f"config.tokenizer.path is '' there and '{other}' here" in line
    assert not re.search(r"\b[0-9a-f]{64}\b", line)


def test_a_truncated_checkpoint_is_named_and_the_one_before_serves(corpus, undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    checkpoint = workdir / "checkpoints" / str(STEPS)
    largest = max((checkpoint / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    for mode in ("train", "evaluate", "generate"):
        outcome = launched(*small_run(corpus, workdir), *in_mode(mode))
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
    here = f"process 0 of 1 on host {socket.gethostname()}"
    for _ in range(2):  # the same command stops at the same place, with the same words
        outcome = launched(*small_run(corpus, tmp_path, **ruinous))
        line = refused(
            outcome, "step 1: loss nan", "not finite", here, f"checkpoint 1 in {tmp_path}"
        )
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
