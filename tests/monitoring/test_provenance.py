"""run.json says how a launch can be repeated."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import engram_jax
from engram_jax.checkpoint import run_record
from engram_jax.config import Config, TrainConfig, parse_config
from engram_jax.config.errors import UserError
from engram_jax.monitoring import provenance

ROOT = Path(__file__).resolve().parents[2]


def test_every_launch_is_added(tmp_path):
    config = Config(name="first", train=TrainConfig(steps=12, samples=("def ", "class ")))
    text = {"source": "a folder", "digest": "0123", "train_tokens": 7}
    path = run_record.add_launch(tmp_path / "run", config, text)
    run_record.add_launch(tmp_path / "run", Config(name="second"), {}, resumed_at=7)
    first, second = json.loads(path.read_text())["launches"]
    assert (first["resumed_at"], second["resumed_at"]) == (0, 7)
    assert parse_config(first["config"]) == config  # the whole configuration, lossless
    assert second["config"]["name"] == "second"
    assert first["data"] == text
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["numpy"] == np.__version__
    assert first["versions"]["engram_jax"] == engram_jax.__version__
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert first["devices"]["platform"] == "cpu"
    assert shlex.split(first["command"]) == sys.orig_argv
    assert first["environment"]["JAX_PLATFORMS"] == "cpu"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_foreign_file_is_refused_and_kept(tmp_path):
    for text in ("{", "[]", '{"launches": 3}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json: .*not a record of launches"):
            run_record.add_launch(tmp_path, Config(), {})
        assert (tmp_path / "run.json").read_text() == text


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    package, stranger = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, stranger):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert provenance.git_commit(package) is None  # no repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_commit(package) == {"commit": commit, "dirty": False}
    (package / "__init__.py").write_text("1")
    assert provenance.git_commit(package) == {"commit": commit, "dirty": True}
    assert provenance.git_commit(stranger) is None  # lies in the checkout, is not part of it
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit(package) is None  # no git
