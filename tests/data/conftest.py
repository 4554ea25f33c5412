"""Tiny corpora made of random words, and configurations that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_jax import config as configs
from engram_jax.data import prepare


def words(seed: int, count: int) -> str:
    """`count` words in lines of about ten, different for every seed."""
    rng = np.random.default_rng(seed)
    vocabulary = ["".join(rng.choice(list("abcdefghij"), size=4)) for _ in range(40)]
    chosen = rng.choice(vocabulary, size=count)
    lines = [" ".join(chosen[i : i + 10]) for i in range(0, count, 10)]
    return f"document {seed}\n" + "\n".join(lines) + "\n"


def write_folder(folder: Path, documents: int, seed: int = 0) -> dict[str, str]:
    """`documents` text files of 5 to 60 words; returns {name: text}."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    texts = {}
    for i in range(documents):
        name = f"d{i:03}.txt"
        texts[name] = words(1000 * seed + i, int(rng.integers(5, 60)))
        (folder / name).write_text(texts[name])
    return texts


@pytest.fixture
def make_config(tmp_path):
    """make_config(path, data=..., tokenizer=...) -> Config with its cache below tmp_path."""

    def make(
        path: Path | str, tokenizer: dict[str, Any] | None = None, **data: Any
    ) -> configs.Config:
        values = {
            "data": {
                "source": "folder",
                "path": str(path),
                "cache_dir": str(tmp_path / "cache"),
                "validation_fraction": 0.2,
                "seq_len": 16,
                "batch_size": 4,
                **data,
            },
            "tokenizer": {"vocab_size": 300, **(tokenizer or {})},
        }
        return configs.parse_config(values)

    return make


@pytest.fixture
def prepared(tmp_path, make_config):
    """(PreparedData, Config) of forty random documents."""
    write_folder(tmp_path / "text", 40)
    config = make_config(tmp_path / "text")
    return prepare(config, log=lambda line: None), config


@pytest.fixture
def write_json_lines():
    def write(path: Path, records: list[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return write


@pytest.fixture(scope="session")
def helpers():
    """The functions of this file, for tests (imported by path, not by name)."""

    class Helpers:
        pass

    Helpers.words = staticmethod(words)
    Helpers.write_folder = staticmethod(write_folder)
    return Helpers
