"""Runs the files of tests/eight/, each in a process that has 8 CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The exchange promises bits, so XLA optimises there as for a user (tests/conftest.py).
OPTIMISED = ("test_exchange.py",)
FILES = sorted(path.name for path in (ROOT / "tests" / "eight").glob("test_*.py"))


def run(file: str, marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", marker]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    if file in OPTIMISED:
        flags += " --xla_backend_optimization_level=3"
    done = subprocess.run(
        [*command, f"tests/eight/{file}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file):
    run(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_training.py", "test_ancestry.py"])
def test_on_eight_devices_at_length(file):
    run(file, "slow")


@pytest.mark.slow
@pytest.mark.proof
def test_what_is_proved_on_eight_devices():
    run("test_training.py", "proof")
