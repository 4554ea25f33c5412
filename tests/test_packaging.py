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
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
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
    wanted = [Requirement(text) for text in PROJECT["dependencies"] + OPTIONAL["report"]]
    run, test = (locked(lock, python) for lock in LOCKS)
    assert run.items() <= test.items()
    for requirement in wanted:
        assert requirement.specifier.contains(run[canonicalize_name(requirement.name)])
    own, *tools = [Requirement(text) for text in OPTIONAL["test"]]
    assert own.name == PROJECT["name"] and own.extras == {"lab", "report", "serve"}
    for requirement in [*tools, *map(Requirement, OPTIONAL["serve"])]:
        assert requirement.specifier.contains(test[canonicalize_name(requirement.name)])
    assert "pytest" not in run
    assert not {"numba", "llvmlite", "starlette", "uvicorn", "libtpu"} & run.keys()
    assert run["jax"].startswith("0.10." if python == "3.11" else "0.12.")
    assert "setuptools" in run  # what the editable install is built with


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_of_the_site_meets_its_requirements(python):
    found = locked("requirements-docs.lock", python)
    for text in PROJECT["optional-dependencies"]["docs"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)])
    assert "jax" not in found  # docstrings are read, nothing is imported


def test_every_import_is_declared():
    texts = PROJECT["dependencies"] + OPTIONAL["lab"] + OPTIONAL["report"] + OPTIONAL["serve"]
    texts += OPTIONAL["wandb"] + OPTIONAL["mlflow"] + OPTIONAL["eval"]  # in no lock file
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    unlocked = {"wandb": ["wandb"], "mlflow": ["mlflow-skinny"]}
    in_eval = ("lm_eval", "datasets", "evaluate", "nltk", "wonderwords")
    unlocked |= {name: [name] for name in in_eval}
    owners = {**unlocked, **importlib.metadata.packages_distributions()}
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


@pytest.mark.slow
def test_the_wheel_is_the_program(tmp_path):
    """Built, unpacked elsewhere and run from a third folder, with a configuration of the user's."""
    source, unpacked, elsewhere = (tmp_path / name for name in ("source", "unpacked", "elsewhere"))
    elsewhere.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("engram_jax", "kernels_pallas"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    ours = [x for name in ("engram_jax", "kernels_pallas") for x in (ROOT / name).rglob("*")]
    for path in ours:
        if path.suffix in (".py", ".json", ".npz", ".typed", ".html", ".css", ".js", ".svg"):
            assert (unpacked / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert {x.name for x in unpacked.iterdir() if "." not in x.name} == {
        "engram_jax",
        "kernels_pallas",
    }
    (elsewhere / "own.py").write_text(
        """from engram_jax.config import default_config_dict

def get_config():
    config = default_config_dict()
    config.name = "mine"
    return config
"""
    )
    environment = os.environ | {"PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"}

    def program(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "engram_jax", *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = program("--config=own.py", "--mode=describe")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine\n")
    found = program("--config=own.py", "--mode=serv")
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert [path.name for path in elsewhere.iterdir()] == ["own.py"]


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
