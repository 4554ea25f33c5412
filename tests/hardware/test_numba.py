"""Compiled loops: what is kept on disk is never that of other sources."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numba

from engram_jax.hardware.numba_internals import machine_code_folder

MAIN = """
from inner import add
from engram_jax.hardware.numba_internals import host_jit

@host_jit
def outer(x):
    return add(x) * 10
"""


def inner(amount):
    return f"""
from engram_jax.hardware.numba_internals import host_jit

@host_jit
def add(x):
    return x + {amount}
"""


def run(folder, cache):
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import main; print(main.outer(1))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"ENGRAM_CACHE": cache}
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_a_change_of_a_function_that_another_file_calls_is_seen(tmp_path):
    folder, cache = tmp_path / "code", str(tmp_path / "cache")
    folder.mkdir()
    (folder / "main.py").write_text(MAIN)
    (folder / "inner.py").write_text(inner(1))
    assert run(folder, cache) == run(folder, cache) == 20
    kept = list((tmp_path / "cache" / "native").iterdir())
    assert len(kept) == 1 and list(kept[0].rglob("main.outer*.nbc"))
    (folder / "inner.py").write_text(inner(2))
    assert run(folder, cache) == 30


def test_without_a_place_to_write_it_is_compiled_anyway(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "file"))
    path = tmp_path / "alone.py"
    path.write_text(inner(5))
    spec = importlib.util.spec_from_file_location("alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert machine_code_folder(tmp_path) == "" and module.add(1) == 6


def test_numbas_own_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/elsewhere")
    from engram_jax.hardware.numba_internals import host_jit

    @host_jit
    def one():
        return 1

    assert one() == 1 and numba.config.CACHE_DIR == "/elsewhere"
