"""The scripts that rent TPUs: what they would run. `make lint` runs shellcheck."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RENTING = {"PROJECT": "mine", "ZONE": "us-east5-a", "BUCKET": "stuff", "DRY_RUN": "1"}
WHERE = ["--project=mine", "--zone=us-east5-a"]
FLAGS = ["--config=configs/engram27b.py", "--config.train.samples=('a b',)"]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "scripts" / script), *arguments]
    known = {k: v for k, v in os.environ.items() if k not in {*RENTING, "SPOT", "SLICES"}}
    env = known | RENTING | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


def commands(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """What it would run, each as its arguments."""
    done = run(script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [
        ("v5p-256", "v2-alpha-tpuv5"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_asking_for_a_slice(type_, runtime):
    asked, looked = commands("tpu_slice.sh", "create", "one", type_)
    assert asked == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "one", "--node-id=one"),
        *(f"--accelerator-type={type_}", f"--runtime-version={runtime}", *WHERE),
    ]
    assert looked[:6] == ["gcloud", "compute", "tpus", "queued-resources", "describe", "one"]
    spot, _ = commands("tpu_slice.sh", "create", "one", type_, SPOT="1")
    assert "--spot" in spot and "--spot" not in asked


def test_flags_arrive_as_they_were_given():
    (command,) = commands("tpu_slice.sh", "train", "one", *FLAGS)
    assert command[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "one", "--worker=all"]
    remote = shlex.split(command[7].removeprefix("--command="))
    assert remote[remote.index("launch.py") + 1 :][: len(FLAGS)] == FLAGS
    (command,) = commands("tpu_gke.sh", "train", "cluster", "v5p-256", "run", *FLAGS)
    (remote,) = (c.removeprefix("--command=") for c in command if c.startswith("--command="))
    assert shlex.split(remote)[-len(FLAGS) :] == FLAGS


def test_every_command_has_a_dry_run():
    for arguments in (["bucket"], ["install", "a"], ["mount", "a"], ["log", "a"], ["stop", "a"]):
        assert commands("tpu_slice.sh", *arguments)
    assert commands("tpu_slice.sh", "run", "a", "ls -l")[0][-3] == "--command=ls -l"
    assert commands("tpu_slice.sh", "delete", "a")[0][-4:] == ["--force", "--quiet", *WHERE]
    for arguments in (["cluster", "a", "v6e-256"], ["list", "a"], ["stop", "a", "b"]):
        assert all(c[0] == "xpk" for c in commands("tpu_gke.sh", *arguments))
    assert commands("tpu_gke.sh", "delete", "a")[0][:3] == ["xpk", "cluster", "delete"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_slice.sh", [], "COMMAND: missing"),
        ("tpu_slice.sh", ["start", "a"], "COMMAND start: must be bucket, create"),
        ("tpu_slice.sh", ["create"], "NAME: missing"),
        ("tpu_slice.sh", ["create", "a"], "TYPE: missing"),
        ("tpu_slice.sh", ["create", "a", "h100"], "TYPE h100: must be v5p-N"),
        ("tpu_gke.sh", ["train", "a", "v5p-8"], "needs NAME TYPE RUN FLAGS"),
        ("tpu_gke.sh", ["walk", "a"], "COMMAND walk: must be cluster, train"),
    ],
)
def test_refusals(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode != 0 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_project_must_be_set():
    done = run("tpu_slice.sh", "stop", "a", PROJECT="")
    assert done.returncode != 0 and "PROJECT: must be set" in done.stderr
