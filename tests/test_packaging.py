"""The lock files pin what pyproject.toml asks for; the Makefile fails in one line."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-test.lock")
PYTHONS = ("3.11", "3.12", "3.13")


def pins(lock: str) -> list[Requirement]:
    text = (ROOT / lock).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [Requirement(line.split(" --hash")[0]) for line in lines]


def locked(lock: str, python: str) -> dict[str, str]:
    """Version by package, on Linux under this Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins(lock)
        if pin.marker is None or pin.marker.evaluate(environment)
    }


@pytest.mark.parametrize("lock", [*LOCKS, "requirements-docs.lock"])
def test_the_lock_is_public_and_hashed(lock):
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|index|find-links|file:|(^|\s)/|\.whl", text, re.MULTILINE)
    for block in re.split(r"\n(?=\S)", text):
        if not block.startswith("#"):
            assert re.match(r"[a-z0-9.-]+==", block), block
            assert "--hash=sha256:" in block, block


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_meets_the_requirements(python):
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    run, test = (locked(lock, python) for lock in LOCKS)
    assert run.items() <= test.items()
    for requirement in wanted:
        assert requirement.specifier.contains(run[canonicalize_name(requirement.name)])
    for text in PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(test[canonicalize_name(requirement.name)])
    assert "pytest" not in run
    assert run["jax"].startswith("0.10." if python == "3.11" else "0.11.")
    assert "setuptools" in run  # what the editable install is built with


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_of_the_site_meets_its_requirements(python):
    found = locked("requirements-docs.lock", python)
    for text in PROJECT["optional-dependencies"]["docs"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)])
    assert "jax" not in found  # docstrings are read, nothing is imported


def test_every_import_is_declared():
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    for path in [*(ROOT / "engram_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            for module in modules:
                top = module.split(".")[0]
                if top not in (*sys.stdlib_module_names, "engram_jax", "configs", "kernels_pallas"):
                    names = {canonicalize_name(name) for name in owners[top]}
                    assert names & declared, f"{path}: {top} is not in pyproject.toml"


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    shutil.copy(ROOT / "Makefile", directory)
    for name in (*LOCKS, "pyproject.toml"):
        (directory / name).write_text("")
    command = ["make", *arguments]
    # `make test` tells its children that they run under make; a user's shell does not.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    return subprocess.run(
        command,
        cwd=directory,
        env={name: value for name, value in os.environ.items() if name not in outer},
        capture_output=True,
        text=True,
        timeout=60,
    )


def interpreter(path: Path, answers: str) -> str:
    path.write_text(f'#!/bin/sh\ncase "$*" in\n{answers}\nesac\n')
    path.chmod(0o755)
    return f"PYTHON={path}"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("*version_info*) exit 1;;", "is missing or not Python 3.11 to 3.14"),
        ("*ensurepip*) exit 1;;", "has no venv module; install it"),
    ],
)
def test_an_unusable_python_is_one_line(tmp_path, answers, message):
    done = make(tmp_path, interpreter(tmp_path / "old-python", answers), "demo")
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert message in first
    assert "old-python" in first
    assert all(line.startswith("make: ***") for line in rest)
    assert not (tmp_path / ".venv").exists()


def test_an_interrupted_install_starts_afresh(tmp_path):
    """A stand-in for Python writes down what make asks of it; the second install is cut short."""
    (tmp_path / "fail").write_text("")
    python = interpreter(
        tmp_path / "python",
        f"""*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> {tmp_path}/log;;
*"-m pip"*) echo pip >> {tmp_path}/log; test ! -e {tmp_path}/fail;;
*launch.py*) echo launch >> {tmp_path}/log;;""",
    )

    def log() -> list[str]:
        lines = (tmp_path / "log").read_text().split()
        (tmp_path / "log").unlink()
        return lines

    assert make(tmp_path, python, "demo").returncode != 0
    assert log() == ["venv", "pip"]
    (tmp_path / "fail").unlink()
    assert make(tmp_path, python, "demo").returncode == 0
    assert log() == ["venv", "pip", "pip", "launch"]  # the half-made environment is not trusted
    done = subprocess.run(["make", python, "demo"], cwd=tmp_path, capture_output=True, check=True)
    assert log() == ["launch"], done.stderr  # nothing is installed twice
