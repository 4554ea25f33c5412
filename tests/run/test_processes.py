"""A run of many processes, or of one with many devices, is the run of one process and one device.

All of them are started as a user starts them, in float64: what differs is the order of sums (over
devices, and in Muon's sharded products), and at this learning rate such differences grow a thousand
times in ten steps, which in float32 flips a close choice of experts (docs/log.md). In float64 the
losses of 24 steps agree to TOLERANCE, relative; what is counted is equal.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.moving import free_port
from tests.runs import ROOT, small_run
from tests.xla_flags import CPU_ALONE, QUICK

TOLERANCE = 1e-7
FLOAT64 = {"model__dtype": "float64", "model__param_dtype": "float64"}
STEPS = 24
MIDDLE = 18  # a checkpoint that a finished run still has


def run_among(processes: int, *arguments: str, devices: int = 1) -> list[str]:
    """`python launch.py ARGUMENTS` in so many processes of so many devices; what each printed. They
    compile as the fast tests do: what XLA makes of one device's part is no question here."""
    flags = f"{QUICK} {CPU_ALONE} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    if processes > 1:
        at = f"--coordinator_address=localhost:{free_port()}"
        command += [at, f"--num_processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, *([f"--process_id={rank}"] if processes > 1 else [])],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    ended = [process.communicate(timeout=400) for process in started]
    for process, (out, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, out[-2000:] + err[-4000:]
    return [out for out, _ in ended]


def arguments(corpus: Path, workdir: Path, **mesh: int) -> list[str]:
    return small_run(corpus, workdir, **FLOAT64, **{f"mesh__{k}": n for k, n in mesh.items()})


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """The run of one process and one device; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("alone")
    run_among(1, *arguments(corpus, workdir))
    return workdir


def records(workdir: Path) -> dict[int, dict]:
    """metrics.jsonl: the last line of every step that has a loss."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if "loss" in r}


def assert_same_run(workdir: Path, one: Path) -> None:
    ours, theirs = records(workdir), records(one)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    losses = [np.array([found[s]["loss"] for s in sorted(found)]) for found in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=TOLERANCE)
    for step, record in theirs.items():
        for key in ("rows_touched/1", "hit_rate/1"):
            assert ours[step][key] == record[key], (step, key)


def assert_same_documents(workdir: Path, one: Path) -> None:
    ours, theirs = (np.load(folder / "held_out_documents.npz") for folder in (workdir, one))
    assert theirs["nats"].sum() > 0 and theirs["seen_targets"].sum() > 0
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=TOLERANCE, err_msg=name)


def rewound(source: Path, to: Path) -> Path:
    """A copy of a finished run without its checkpoints after MIDDLE."""
    shutil.copytree(source, to)
    for checkpoint in (to / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > MIDDLE:
            shutil.rmtree(checkpoint)
    return to


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_and_back_to_one(corpus, alone, tmp_path):
    two = tmp_path / "two"
    out = run_among(2, *arguments(corpus, two))
    assert_same_run(two, alone)
    assert "held-out loss" in out[0] and "held-out loss" not in out[1]
    for name in ("report.html", "losses.json"):
        assert (two / name).is_file()
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (two, alone)]
    for loss in ("held_out_loss", "validation_loss"):
        mine, other = (found[loss] for found in losses)
        assert (mine["batches"], mine["targets"]) == (other["batches"], other["targets"])
        for name, value in other["nats_per_token"].items():
            assert mine["nats_per_token"][name] == pytest.approx(value, rel=TOLERANCE), name
    assert_same_documents(two, alone)
    (two / "held_out_documents.npz").unlink()

    evaluated = run_among(2, *arguments(corpus, two), "--mode=evaluate", "--json")
    assert_same_documents(two, alone)
    assert "held_out_loss" not in evaluated[1]
    line = next(line for line in evaluated[0].splitlines() if line.startswith("{"))
    loss = losses[0]["held_out_loss"]["nats_per_token"]["engram_tiny"]
    assert json.loads(line)["held_out_loss"] == pytest.approx(loss, rel=TOLERANCE)

    back = rewound(two, tmp_path / "back")
    assert f"resumed from step {MIDDLE}" in run_among(1, *arguments(corpus, back))[0]
    assert_same_run(back, alone)


@pytest.mark.slow
def test_four_processes(corpus, alone, tmp_path):
    run_among(4, *arguments(corpus, tmp_path))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_eight_devices_then_four_then_one(corpus, alone, tmp_path):
    eight = tmp_path / "eight"
    run_among(1, *arguments(corpus, eight, fsdp=2, expert=2, tensor=2), devices=8)
    assert_same_run(eight, alone)
    four = rewound(eight, tmp_path / "four")
    run_among(2, *arguments(corpus, four, expert=2), devices=2)
    assert_same_run(four, alone)
    one = rewound(four, tmp_path / "one")
    run_among(1, *arguments(corpus, one))
    assert_same_run(one, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_two_processes_start_from_another_run(corpus, alone, tmp_path, kept):
    """As one does (train.init_from), with a fresh optimizer or the other run's moments."""
    keys = FLOAT64 | {"train__init_from": f"{alone}@{MIDDLE}", "train__init_optimizer": kept}
    one, two = tmp_path / "one", tmp_path / "two"
    run_among(1, *small_run(corpus, one, **keys))
    out = run_among(2, *small_run(corpus, two, **keys))
    assert f"initialised from step {MIDDLE} of {alone}" in out[0] and "initialised" not in out[1]
    assert_same_run(two, one)
    origins = [
        json.loads((folder / "run.json").read_text())["launches"][0]["initialised_from"]
        for folder in (one, two)
    ]
    assert origins[0] == origins[1] and origins[0]["step"] == MIDDLE
