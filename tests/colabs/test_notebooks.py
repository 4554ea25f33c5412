"""What can be said of the notebooks without running them."""

from __future__ import annotations

import ast
import re
import sys

import nbformat
import pytest

from engram_jax import api
from scripts import repository_address
from tests.colabs.notebooks import (
    FILES,
    INSTALL,
    NAMES,
    code_cells,
    read,
    settings_cell,
)
from tests.runs import ROOT

# Beside the standard library. `engram_jax` is `from engram_jax import api` alone.
ALLOWED = {"IPython", "jax", "matplotlib", "numpy"}


def python_of(source: str) -> ast.Module:
    """A cell without IPython's own lines."""
    return ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE))


def test_there_are_five():
    assert [name.split("_")[0] for name in NAMES] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_is_stored_without_what_running_it_leaves(file):
    assert file.stat().st_size < 1_000_000
    notebook = read(file.stem)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    identities = [cell.id for cell in notebook.cells]
    assert len(set(identities)) == len(identities)
    assert not any(re.fullmatch(r"[0-9a-f]{8}(-.*)?", one) for one in identities)  # none is drawn
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert file.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_prose_comes_first_and_often(name):
    cells = read(name).cells
    assert cells[0].cell_type == "markdown" and len(cells[0].source) > 400
    prose = sum(len(cell.source) for cell in cells if cell.cell_type == "markdown")
    assert sum(cell.cell_type == "markdown" for cell in cells) > len(cells) / 3 and prose > 2500
    for cell in code_cells(read(name)):
        assert cell.source.count("\n") < 45, f"{name}: {cell.id} is long"


@pytest.mark.parametrize("name", NAMES)
def test_it_uses_the_public_interface_alone(name):
    """`engram_jax.api` by the names that it promises, and launch.py as a process."""
    used = set()
    for cell in code_cells(read(name)):
        for node in ast.walk(python_of(cell.source)):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
                assert tops <= {*ALLOWED, *sys.stdlib_module_names}, f"{name}: {cell.id}"
            elif isinstance(node, ast.ImportFrom):
                if node.module == "engram_jax":
                    assert [alias.name for alias in node.names] == ["api"], f"{name}: {cell.id}"
                else:
                    top = str(node.module).split(".")[0]
                    assert top in {*ALLOWED, *sys.stdlib_module_names}, f"{name}: {cell.id}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "api":
                    used.add(node.attr)
                assert not node.attr.startswith("_")
                assert node.attr != "program", f"{name}: {cell.id}: not a promise of the interface"
    assert used <= set(api.__all__)
    assert used or name.startswith("e_")  # which is about launch.py alone


@pytest.mark.parametrize("name", NAMES)
def test_its_install_cell_is_every_notebook_s(name):
    """But for the extra; it comes before the settings, and these before all other code."""
    (cell,) = [cell for cell in code_cells(read(name)) if cell.id == INSTALL]
    (first,) = [cell for cell in code_cells(read(NAMES[0])) if cell.id == INSTALL]
    extra = re.compile(r'"\.\[(\w+)\]"')
    assert extra.sub("", cell.source) == extra.sub("", first.source)
    assert extra.findall(cell.source) and len(extra.findall(cell.source)) == 1
    order = [one.id for one in code_cells(read(name))]
    assert order[:2] == [INSTALL, settings_cell(read(name)).id]


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name):
    """They are whole addresses: Colab does not know what lies beside a notebook."""
    place = re.compile(rf"https://\S+/{re.escape(repository_address.address())}/blob/main/(.+)")
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)\s]+)\)", cell.source):
                found = place.fullmatch(target.partition("#")[0])
                assert found or "github" not in target, f"{name}: {target}"
                assert found is None or (ROOT / found[1]).exists(), f"{name}: {target}"
                assert target.startswith("https://"), f"{name}: {target}"
        else:
            for path in re.findall(r"\b(?:configs|docs|scripts)/[\w/]+\.\w+", cell.source):
                assert (ROOT / path).exists(), f"{name}: {path}"
