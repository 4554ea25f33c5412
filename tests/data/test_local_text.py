"""The embedded text: the standard library's sources, whatever else is on the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from engram_jax.config.errors import UserError
from engram_jax.data import prepare, train_batches
from engram_jax.data import source_report as why
from engram_jax.data.cache import cache_root
from engram_jax.data.corpus import open_corpus
from engram_jax.data.local_text import list_library

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_path("stdlib"))

# What an installation may have in the folder of its library, and whether it is read.
LIBRARY = {
    "abc.py": True,
    "json/__init__.py": True,
    "json/decoder.py": True,
    "asyncio/deep/er.py": True,
    "json/table.txt": False,
    "json/tests/test_decoder.py": False,
    "unittest/test/support.py": False,
    "ctypes/macholib/dyld.py": False,
    "json/__pycache__/decoder.py": False,
    "test/test_json.py": False,
    "idlelib/idle.py": False,
    "tkinter/__init__.py": False,
    "encodings/cp437.py": False,
    "pydoc_data/topics.py": False,
    "site.py": False,
    "sitecustomize.py": False,
    "_sysconfigdata__linux_x86_64-linux-gnu.py": False,
    "config-3.11-x86_64-linux-gnu/python-config.py": False,
    "site-packages/numpy/abc.py": False,
    "dist-packages/yaml/abc.py": False,
    "numpy.py": False,
}

ELSEWHERE = """
import sys
from engram_jax.config import DataConfig
from engram_jax.data.cache import cache_root
from engram_jax.data.corpus import open_corpus
data = DataConfig(cache_dir=sys.argv[1], max_megabytes=2)
corpus = open_corpus(data, cache_root(data), print)
print(len(list(corpus.documents("train"))))
print(corpus.report.digest, "tensorflow_datasets" in sys.modules)
"""


def test_what_belongs_to_the_library(tmp_path):
    for name in LIBRARY:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    names = [file.name for file in list_library(tmp_path)]
    assert sorted(names) == sorted(name for name, read in LIBRARY.items() if read)


def test_the_text_is_the_same_whatever_is_installed(tmp_path, make_config):
    """In another process and folder, with another version of a package that this project needs: the
    same text, without TFDS, and no temporary folder is left."""
    package = tmp_path / "site" / "packaging-99.0.dist-info"
    package.mkdir(parents=True)
    prose = "Nothing that is installed is part of the text.\n" * 1000
    (package / "METADATA").write_text(f"Name: packaging\nVersion: 99.0\n\n{prose}")
    (package / "RECORD").write_text("packaging-99.0.dist-info/METADATA,,\n")
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "other cache")],
        env=os.environ
        | {"TMPDIR": str(tmp_path / "temporary")}
        | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    config = make_config("", source="local", max_megabytes=2, validation_fraction=0.02)
    corpus = open_corpus(config.data, cache_root(config.data), lambda line: None)
    digest, imported = done.stdout.splitlines()[-1].split()
    assert digest == corpus.report.digest
    assert imported == "False"
    assert os.listdir(tmp_path / "temporary") == []

    documents = {*corpus.documents("train"), *corpus.documents("validation")}
    library = [p for p in STDLIB.rglob("*.py") if "site-packages" not in p.parts]
    assert documents <= {p.read_text(encoding="utf-8", errors="replace") for p in library}
    total = sum(len(text.encode()) for text in documents)
    assert 1_800_000 < total <= 2_000_000
    assert corpus.report.train_bytes + corpus.report.validation_bytes == total
    left_out = corpus.report.skipped[why.OVER_LIMIT]
    assert left_out.bytes + total > 5_000_000
    lines: list[str] = []
    corpus.report.log(lines.append)
    assert f"standard library of Python {platform.python_version()}: " in lines[0]
    assert f"digest {digest}" in lines[0]


def test_the_digest_is_that_of_the_text(tmp_path, make_config, monkeypatch):
    """Another text, another digest; the former text in files of another time: the former digest."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("abc", "ast", "bisect", "calendar"):
        (library / f"{name}.py").write_text(f"# About {name}, in words.\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    config = make_config("", source="local")

    def found() -> tuple[str, str]:
        prepared = prepare(config, lambda line: None)
        assert prepared.summary()["digest"] == prepared.report.digest
        return prepared.report.digest, prepared.fingerprint

    first = found()
    (library / "ast.py").write_text("# About something else.\n")
    second = found()
    assert first[0] != second[0]
    assert first[1] != second[1]
    (library / "ast.py").write_text("# About ast, in words.\n")
    assert found() == first


def test_a_python_without_sources_is_refused(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    config = make_config("", source="local")
    with pytest.raises(UserError, match=r"no sources of Python.s .*/python311\.zip; give text"):
        open_corpus(config.data, cache_root(config.data), lambda line: None)


@pytest.mark.slow
@pytest.mark.proof
def test_embedded_default_end_to_end(make_config):
    config = make_config(
        "",
        {"vocab_size": 2048},
        source="local",
        validation_fraction=0.03,
        seq_len=256,
        batch_size=16,
    )
    lines: list[str] = []
    prepared = prepare(config, lines.append)
    assert len(prepared.store_train) > 2 * 400 * 2048  # the demo's training, twice
    assert len(prepared.store_valid) > 20_000
    assert 2.5 < prepared.bytes_per_token < 4.5
    assert next(train_batches(prepared, config))["tokens"].shape == (16, 256)
    assert prepare(config, lines.append).fingerprint == prepared.fingerprint
