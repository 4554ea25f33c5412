"""Training needs none of the extras; what needs one says so in a line, before anything is done."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from engram_jax.config.extras import PACKAGES
from tests.runs import ROOT, TINY, launched, refused, small_run, write_corpus

OPTIONAL = sorted({package for packages in PACKAGES.values() for package in packages})
PROJECT = (ROOT / "pyproject.toml").read_text()

# Hides packages from a process that begins with it: as if they were not installed.
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""

TRAINING = ("cli", "run.loop", "training.step", "evaluation.held_out", "serve.open_engine")
# What is behind `extras.installed` or `extras.lacks`, and imported by what asks there alone.
BEHIND = {"hardware.numba_internals", "addressing.hash_numba", "report.figures", "lab.figures"}
BEHIND |= {"report.analysis_figures"}
BEHIND |= {"harness.lm", "harness.loading", "harness.evaluate", "harness.ruler"}

# What is not promised, and the one file that may use it; names of a library that begin with "_" are
# allowed nowhere else either.
INTERNALS = {
    "numba": "hardware/numba_internals.py",
    "llvmlite": "hardware/numba_internals.py",
    "orbax-checkpoint": "checkpoint/orbax_internals.py",
    "uvicorn": "serve/http/uvicorn_internals.py",
    "jax": "distributed/jax_internals.py",
    "tensorboardX": "monitoring/tensorboardx_internals.py",
}
FILES = set(INTERNALS.values())
PRIVATE = re.compile(
    r"llvmlite|uvicorn|numba\.(core|extending|config|types\.ExternalFunction)\b"
    # Of Orbax, anything but arguments and what is saved and restored by.
    r"|orbax\.checkpoint\.(?!(args|SaveArgs|RestoreArgs|ArrayRestoreArgs)\b)"
    r"|[a-z]\w*(\.\w+)*\._[a-z]\w*"
)


def fresh(code: str) -> list[str]:
    """The lines that a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """As if these were not installed."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in packages:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with pytest.MonkeyPatch.context() as patch:
        for package in packages:
            patch.delitem(sys.modules, package, raising=False)
        patch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        yield


def test_training_imports_no_extra():
    imports = "\n".join(f"import engram_jax.{name}" for name in TRAINING)
    found = fresh(f"import sys\n{imports}\nprint([p for p in {OPTIONAL} if p in sys.modules])")
    assert found == ["[]"]


def test_every_module_does_without_the_extras_or_names_one():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "engram_jax").rglob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    lines = fresh(f"""{HIDE}
import importlib
for name in {names}:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name.removeprefix("engram_jax."), type(error).__name__, error)
""")
    told = dict(line.split(" ", 1) for line in lines)
    assert told.keys() >= BEHIND
    for name, what in told.items():
        if name not in BEHIND:
            assert name.startswith(("memory.store.", "serve.", "explore.")), name
            assert re.match(r"UserError .*needs the extra 'serve'; \w+ is not installed", what)
    assert not {"serve.engine", "serve.open_engine", "serve.lower_steps"} & told.keys()


@pytest.mark.parametrize("package", PACKAGES["serve"])
@pytest.mark.parametrize("mode", ["serve", "explore", "export-memory", "count-memory"])
def test_a_mode_without_its_extra_is_one_line(tmp_path, mode, package):
    arguments = [TINY, f"--workdir={tmp_path / 'run'}", f"--mode={mode}"]
    if mode.endswith("-memory"):
        arguments += [f"--output={tmp_path / 'file'}"]
    with hidden(package):
        ended = launched(*arguments)
    refused(ended, f"--mode={mode}", "the extra 'serve'", f"{package} is not", '-e ".[serve]"')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", PACKAGES["eval"])
def test_lm_eval_without_its_extra_is_one_line(tmp_path, package, monkeypatch):
    have = [p for p in PACKAGES["eval"] if p != package]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name in have or found(name, *rest)
    )
    arguments = [TINY, f"--workdir={tmp_path / 'run'}", "--mode=lm-eval", "--tasks=a"]
    with hidden(package):
        ended = launched(*arguments)
    refused(ended, "--mode=lm-eval", "the extra 'eval'", f"{package} is not", '-e ".[eval]"')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"memory": "host"}, "config.serve.memory = 'host'"),
        ({"memory": "disk", "memory_file": "x"}, "config.serve.memory = 'disk'"),
        ({"memory_file": "x"}, "config.serve.memory_file = 'x'"),
    ],
)
def test_stored_rows_without_the_extra_are_one_line(tmp_path, keys, words):
    given = [f"--config.serve.{key}={value}" for key, value in keys.items()]
    arguments = [TINY, f"--workdir={tmp_path / 'run'}", "--mode=generate", "--prompt=a"]
    with hidden("numba"):
        ended = launched(*arguments, *given)
    refused(ended, words, "the extra 'serve'", "numba is not installed")
    assert not (tmp_path / "run").exists()


def test_a_run_without_any_extra(tmp_path):
    """It trains, reports without pictures, is evaluated, and continues a text in the same way."""
    corpus, workdir = write_corpus(tmp_path / "text"), tmp_path / "run"
    run = small_run(corpus, workdir, train__steps=6, train__eval_every=6)
    prompt = ["--mode=generate", "--prompt=document", "--config.generate.max_tokens=8"]
    with hidden(*OPTIONAL):
        done = launched(*run)
        assert done.code == 0, done.err
        line = "the report will have no pictures: matplotlib is not installed (pip install"
        assert done.out.count(line) == 1
        assert "matplotlib is not installed" in (workdir / "report.md").read_text()
        assert "matplotlib is not installed" in (workdir / "report.html").read_text()
        assert not list(workdir.rglob("*.png"))
        assert launched(*run, "--mode=evaluate").code == 0
        without = launched(*run, *prompt)
        assert without.code == 0, without.err
    with_numba = launched(*run, *prompt)
    assert without.out == with_numba.out
    done = launched(*run)  # finished: it reports again
    assert "no pictures" not in done.out
    assert list((workdir / "report").glob("*.png"))


# In no lock file: package -> distribution.
UNLOCKED = {
    **{name: (name,) for name in ("wandb", "alembic", "sqlalchemy")},
    **{name: (name,) for name in ("lm_eval", "datasets", "evaluate", "nltk", "wonderwords")},
    "mlflow": ("mlflow-skinny",),
}


def test_the_extras_are_those_of_the_project():
    project = tomllib.loads(PROJECT)["project"]
    needed = {re.split(r"[<>=; \[]", text)[0] for text in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    for extra, packages in PACKAGES.items():
        texts = project["optional-dependencies"][extra]
        named = {
            name for package in packages for name in distributions.get(package) or UNLOCKED[package]
        }
        assert {re.split(r"[<>=;]", text)[0] for text in texts} == named
        assert not needed & named


@pytest.mark.parametrize("package", INTERNALS)
def test_what_is_used_privately_is_bounded_and_named(package):
    line = next(x for x in PROJECT.splitlines() if x.strip().startswith(f'"{package}>='))
    assert re.search(r",<\d+\.\d+\"", line)
    assert f"engram_jax/{INTERNALS[package]}" in PROJECT
    assert "pyproject.toml" in (ROOT / "engram_jax" / INTERNALS[package]).read_text()


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports, and of the attributes it takes of it."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if parts and isinstance(at, ast.Name) and at.id in known:
            yield node.lineno, ".".join([known[at.id], *reversed(parts)])


def private(text: str) -> list[str]:
    own = ("engram_jax", "kernels_pallas", "configs", *sys.stdlib_module_names)
    return [
        f"{line}: {name}"
        for line, name in used(ast.parse(text))
        if name.split(".")[0] not in own and PRIVATE.match(name)
    ]


def test_private_use_stands_in_one_file_for_each_library():
    found = [
        f"{path.relative_to(ROOT)}:{use}"
        for package in ("engram_jax", "kernels_pallas")
        for path in sorted((ROOT / package).rglob("*.py"))
        if str(path.relative_to(ROOT / package)) not in FILES
        for use in private(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("from jax._src import distributed", True),
        ("import jax\njax._src.core", True),
        ("import flax.nnx as nnx\nnnx.Module._pytree", True),
        ("import numba\nnumba.config.CACHE_DIR", True),
        ("from numba import types\ntypes.ExternalFunction", True),
        ("import orbax.checkpoint as ocp\nocp.handlers", True),
        ("import uvicorn", True),
        ("import jax\njax.numpy.zeros", False),
        ("from numba import types, uint64\ntypes.intp", False),
        ("import orbax.checkpoint as ocp\nocp.args.JsonSave", False),
        ("import os\nos._exit", False),
    ],
)
def test_the_walk_sees(text, seen):
    assert bool(private(text)) == seen


def test_the_files_use_what_they_are_for():
    for name in FILES:
        assert private(Path(ROOT, "engram_jax", name).read_text()), name
