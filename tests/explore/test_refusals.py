"""What --mode=explore does not take, in a line, before a checkpoint is read."""

from __future__ import annotations

import re
import socket

import pytest

from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.config.serving_schema import HIDDEN
from engram_jax.explore.server import check_no_keys
from tests.runs import TINY, launched, refused

MODE = (TINY, "--mode=explore")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--config.model.engram.layers=()"], "layers = (): has no memory to explore"),
        (
            ["--config.model.engram.lookup=shuffled", "--config.train.samples=()"],
            "'shuffled': is a control",
        ),
        (["--config.serve.memory=host"], "config.serve.memory = 'host': --mode=explore has the"),
        (["--config.serve.host=nowhere.invalid"], "host 'nowhere.invalid', port 8000"),
        (["--tokens=0"], "--tokens=0: must be at least 1"),
        (["--prompt=a"], "--prompt: only for --mode=generate"),
    ],
)
def test_it_is_one_line(tmp_path, given, words):
    refused(launched(*MODE, f"--workdir={tmp_path / 'run'}", *given), words)
    assert not list(tmp_path.iterdir())


def test_keys_would_be_no_protection(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_API_KEY", "sk-secret")
    line = refused(
        launched(*MODE, f"--workdir={tmp_path / 'run'}"),
        "$ENGRAM_API_KEY: --mode=explore has a page that sends no key",
    )
    assert "sk-secret" not in line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, None),
        ({"api_key": (HIDDEN,)}, None),
        ({"host": "0.0.0.0"}, None),
        ({"api_key": (HIDDEN,), "host": "0.0.0.0"}, "had API keys, and --mode=explore asks for"),
        ({"api_key": (HIDDEN, "sk-secret")}, "config.serve.api_key: --mode=explore has a page"),
        ({"api_key_file": "keys.txt"}, "config.serve.api_key_file: --mode=explore has a page"),
    ],
)
def test_keys_of_a_configuration(keys, words):
    if words is None:
        check_no_keys(ServeConfig(**keys), {})
        return
    with pytest.raises(UserError, match=re.escape(words)) as error:
        check_no_keys(ServeConfig(**keys), {})
    assert "sk-secret" not in str(error.value)


def test_a_port_in_use_is_known_before_the_model(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = launched(*MODE, f"--workdir={tmp_path / 'run'}", f"--config.serve.port={port}")
    refused(outcome, f"port {port} on 127.0.0.1: is in use; config.serve.port gives another")
