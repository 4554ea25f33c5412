"""What is needed to repeat a launch: its command, commit, package versions and machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import engram_jax
from engram_jax.hardware.cores import cores

_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "ml-dtypes",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
)
_VARIABLES = ("XLA_", "JAX_", "LIBTPU_", "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_")


def describe_launch() -> dict[str, Any]:
    """Command, versions, machine and commit of this process, as JSON values."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "git": git_commit(Path(engram_jax.__file__).parent),
        "versions": versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": cores(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }


def cpu_model() -> str:
    """The processor's name, "AMD EPYC", or its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return found[1]
    return platform.processor() or platform.machine()


def process_name() -> str:
    """This process in messages: "process 3 of 16 on host t1v-n-4"."""
    return f"process {jax.process_index()} of {jax.process_count()} on host {socket.gethostname()}"


def versions() -> dict[str, str | None]:
    """Version by package; None if it is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "engram_jax": engram_jax.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit(package: Path) -> dict[str, Any] | None:
    """{"commit": ..., "dirty": ...} of the checkout that `package` is tracked in.

    dirty: tracked files differ from the commit. None without git, outside a checkout, and for a
    package that is only inside another checkout (a virtual environment, say).
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD").strip()
        dirty = bool(_git(package, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout
