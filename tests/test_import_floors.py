"""The floors of the house: a file imports from lower floors or its own folder only.

The table is the documentation; a new file or folder that is missing from it fails the test. Files
directly in engram_jax/ that share a floor count as one folder.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "engram_jax"
KERNELS = "kernels_pallas"  # imports jax only; every floor may use it

# Bottom first. Folders end in a slash; those of one floor do not import each other.
FLOORS: tuple[tuple[str, str], ...] = (
    ("0 what a model is", "errors config config_difference random_streams validation native"),
    ("0 which device has what", "sharding/"),
    ("0 what a compiled program does", "aot/"),
    ("1 tokens to addresses", "address/"),
    ("1 text to batches", "data/"),
    ("2 tables and rows", "memory/"),
    ("3 modules", "layers/"),
    ("4 the network", "model/"),
    ("5 learning", "loss optim/"),
    (
        "6 a run's state and records",
        "train_state workdir checkpoint checkpoint_arrays checkpoint_files saved_state agreement"
        " metrics provenance preemption watchdog profiling throughput goodput device_peaks"
        " distributed same_launch rendezvous run_record run_settings",
    ),
    ("6 a run's report", "report report_figures report_page report_tables"),
    (
        "7 what is done with a model",
        "describe train_step sampling generate run_data planning restore evaluate compile_step",
    ),
    ("7 studies", "analysis/"),
    ("7 serving", "serve/"),
    ("7 the loop and the command", "finish instruments train command_line"),
)
FLOOR_OF = {name: n for n, (_, names) in enumerate(FLOORS) for name in names.split()}


def unit(module: str) -> str:
    """The entry of the table that "engram_jax.layers.norm" or "engram_jax.config" belongs to."""
    parts = module.split(".")
    if len(parts) < 2:
        return ""
    return f"{parts[1]}/" if f"{parts[1]}/" in FLOOR_OF or len(parts) > 2 else parts[1]


def imports(path: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import in a file, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in modules else str(node.module)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(root: Path) -> list[str]:
    """Everything that breaks the rule below `root`, one line each."""
    files = {module_name(p, root): p for p in sorted((root / PACKAGE).rglob("*.py"))}
    folders = {name.rsplit(".", n)[0] for name in files for n in range(1, name.count(".") + 1)}
    found = []
    for name, path in files.items():
        mine, where = unit(name), path.relative_to(root)
        if mine and mine not in FLOOR_OF:
            found.append(f"{where}: {mine} has no floor; add it to FLOORS in {Path(__file__).name}")
            continue
        for line, imported in imports(path, set(files) | folders):
            theirs = unit(imported)
            if imported.split(".")[0] != PACKAGE or theirs == mine or theirs not in FLOOR_OF:
                continue
            mine_floor, theirs_floor = FLOOR_OF.get(mine, -1), FLOOR_OF[theirs]
            together = not mine.endswith("/") and not theirs.endswith("/")
            if theirs_floor > mine_floor or (theirs_floor == mine_floor and not together):
                found.append(
                    f"{where}:{line}: {mine or PACKAGE} imports {imported}, floor"
                    f" '{FLOORS[theirs_floor][0]}'"
                )
    return found


def foreign_to_kernels(root: Path) -> list[str]:
    """What the kernels import besides jax, the standard library and themselves."""
    allowed = {"jax", KERNELS, *sys.stdlib_module_names}
    return [
        f"{path.relative_to(root)}:{line}: imports {imported}"
        for path in sorted((root / KERNELS).rglob("*.py"))
        for line, imported in imports(path, set())
        if imported.split(".")[0] not in allowed
    ]


def test_every_file_imports_from_lower_floors():
    assert violations(ROOT) == []


def test_kernels_import_jax_only():
    assert foreign_to_kernels(ROOT) == []


def test_configurations_import_no_code_but_config():
    allowed = {"ml_collections", "configs", f"{PACKAGE}.config", "__future__"}
    for path in sorted((ROOT / "configs").glob("*.py")):
        for line, imported in imports(path, {f"{PACKAGE}.config"}):
            if imported.split(".")[0] not in allowed:
                assert imported in allowed, f"{path.name}:{line}: imports {imported}"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("layers/a.py", "from engram_jax.layers import b", None),
        ("layers/a.py", "from engram_jax.memory.table import Table", None),
        ("layers/a.py", "import jax\nimport kernels_pallas.gather", None),
        ("train.py", "from engram_jax import evaluate", None),
        ("layers/a.py", "from engram_jax.model.block import Block", "a.py:1: layers/ imports"),
        ("layers/a.py", "def f():\n    import engram_jax.train", "a.py:2: layers/ imports"),
        ("data/a.py", "from engram_jax import memory", "a.py:1: data/ imports engram_jax.memory"),
        ("optim/a.py", "from engram_jax.loss import f", "a.py:1: optim/ imports engram_jax.loss"),
        ("config.py", "from engram_jax import train", "config.py:1: config imports"),
        ("__init__.py", "from engram_jax import config", "__init__.py:1: engram_jax imports"),
        ("newcomer.py", "import jax", "newcomer has no floor; add it to FLOORS"),
        ("newcomers/a.py", "import jax", "newcomers/ has no floor; add it to FLOORS"),
    ],
)
def test_the_walk_sees(tmp_path, file, text, expected):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (tmp_path / PACKAGE / "memory").mkdir(exist_ok=True)
    for name in ("memory/__init__.py", "evaluate.py", "train.py", "config.py"):
        if not (tmp_path / PACKAGE / name).exists():
            (tmp_path / PACKAGE / name).write_text("")
    found = violations(tmp_path)
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert expected in found[0]


def test_the_walk_sees_what_kernels_import(tmp_path):
    (tmp_path / KERNELS).mkdir()
    (tmp_path / KERNELS / "a.py").write_text("import jax.numpy\nimport numpy\n")
    assert foreign_to_kernels(tmp_path) == [f"{KERNELS}/a.py:2: imports numpy"]
