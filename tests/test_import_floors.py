"""Every module lives in a folder, and a folder imports from lower floors only.

A new folder that is missing from the table, or from docs/architecture.md, fails.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "engram_jax"
THIS = Path(__file__).name
KERNELS = "kernels_pallas"  # imports jax only; every floor may use it

# Bottom first. The folders of one floor do not import each other.
FLOORS: tuple[str, ...] = (
    "config hardware",
    "addressing sharding monitoring memory/store tasks",
    "memory layers distributed",
    "model data training/optim",
    "training checkpoint",
    "evaluation analysis report serve",
    "run serve/http aot lab harness",
    "api explore",
)
FLOOR_OF = {folder: n for n, folders in enumerate(FLOORS) for folder in folders.split()}
LOOSE = (
    "__init__",
    "__main__",
    "cli",
    "program_flags",
)  # all that may stand outside a folder, above all of them


def folder_of(module: str) -> str:
    """The folder of the table that "engram_jax.memory.store.dram" belongs to; "" = of none."""
    package, *parts = module.split(".")
    names = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if package == PACKAGE and name in FLOOR_OF), "")


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
        mine, where = folder_of(name), path.relative_to(root)
        if path.parent == root / PACKAGE and path.stem not in LOOSE:
            found.append(f"{where}: stands in no folder")
        elif path.parent != root / PACKAGE and mine != str(path.parent.relative_to(root / PACKAGE)):
            found.append(f"{where}: has no floor; add its folder to FLOORS in {THIS}")
        for line, imported in imports(path, set(files) | folders):
            theirs = folder_of(imported)
            if not theirs or theirs == mine:
                continue
            if mine and FLOOR_OF[theirs] >= FLOOR_OF[mine]:
                found.append(f"{where}:{line}: {mine} imports {imported}, not of a lower floor")
            elif path.stem == "__init__" and not mine:
                found.append(f"{where}:{line}: imports {imported}")
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


def test_the_documentation_has_the_same_floors():
    """docs/architecture.md: a table row `| floor | `folder/` `folder/` | ... |` for each floor."""
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", (ROOT / "docs/architecture.md").read_text(), re.M)
    told: dict[int, set[str]] = {}
    for floor, folders in rows:
        told.setdefault(int(floor), set()).update(re.findall(r"`([\w/]+)/`", folders))
    assert told == {n: set(folders.split()) for n, folders in enumerate(FLOORS)}


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
        ("layers/a.py", "from engram_jax.sharding.rules import P", None),
        ("layers/a.py", "import jax\nimport kernels_pallas.gather", None),
        ("memory/a.py", "from engram_jax.memory.store.dram import HostTable", None),
        ("cli.py", "from engram_jax.run import loop", None),
        ("layers/a.py", "from engram_jax.model.block import Block", "a.py:1: layers imports"),
        ("layers/a.py", "def f():\n    import engram_jax.run.loop", "a.py:2: layers imports"),
        ("addressing/a.py", "from engram_jax import sharding", "a.py:1: addressing imports"),
        ("memory/store/a.py", "from engram_jax.memory import table", "memory/store imports"),
        ("config/a.py", "from engram_jax.run import loop", "a.py:1: config imports"),
        ("__init__.py", "from engram_jax import config", "__init__.py:1: imports"),
        ("newcomer.py", "import jax", "newcomer.py: stands in no folder"),
        ("newcomers/a.py", "import jax", "a.py: has no floor; add its folder to FLOORS"),
        ("layers/more/a.py", "import jax", "a.py: has no floor; add its folder to FLOORS"),
    ],
)
def test_the_walk_sees(tmp_path, file, text, expected):
    path = tmp_path / PACKAGE / file
    for folder in ("memory", "run", "config", "sharding"):
        (tmp_path / PACKAGE / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / folder / "__init__.py").write_text("")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
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
