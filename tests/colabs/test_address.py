"""The repository's address stands in pyproject.toml; what repeats it says the same."""

from __future__ import annotations

import re
import shutil

import pytest

from scripts import repository_address
from tests.colabs.notebooks import INSTALL, NAMES, code_cells, read
from tests.runs import ROOT

BADGE = re.compile(
    r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
    r"\(https://colab\.research\.google\.com/github/([^/\s]+/[^/\s]+)/blob/main/colabs/(\w+)\.ipynb\)"
)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_and_its_badges_name_it(name):
    address = repository_address.address()
    notebook = read(name)
    assert BADGE.findall(notebook.cells[0].source) == [(address, name)]
    (install,) = [cell for cell in code_cells(notebook) if cell.id == INSTALL]
    assert re.findall(r"https://github\.com/([\w.-]+/[\w.-]+)", install.source) == [address]
    readme = (ROOT / "README.md").read_text()
    assert (address, name) in BADGE.findall(readme)


def test_readme_has_no_other_badge():
    found = BADGE.findall((ROOT / "README.md").read_text())
    assert found == [(repository_address.address(), name) for name in NAMES]


def test_a_placeholder_is_called_one():
    is_one = repository_address.address() == repository_address.PLACEHOLDER
    for file in repository_address.files():
        told = repository_address.SAID_SO in file.read_text()
        assert told == (is_one and file.name != "pyproject.toml"), file.name


def test_one_command_changes_all_of_them(tmp_path):
    (tmp_path / "colabs").mkdir()
    for file in repository_address.files():
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    old, new = repository_address.address(), "somebody/another.name"
    before = [file.read_text() for file in repository_address.files()]
    changed = repository_address.replace(new, tmp_path)
    assert repository_address.address(tmp_path) == new
    for file, text in zip(repository_address.files(tmp_path), before, strict=True):
        counted = text.replace(repository_address.SAID_SO, "").count(old)
        assert file.read_text().count(new) == counted
        assert old not in file.read_text()
        assert (str(file.relative_to(tmp_path)) in changed) == (old in text)
    assert len(changed) >= 7
    after = [file.read_text() for file in repository_address.files(tmp_path)]
    repository_address.replace("third/name", tmp_path)
    repository_address.replace(new, tmp_path)  # and back, to the byte
    assert [file.read_text() for file in repository_address.files(tmp_path)] == after


@pytest.mark.parametrize("wrong", [["no-slash"], ["a/b/c"], ["a/b", "c/d"]])
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(SystemExit, match="usage:"):
        repository_address.main(wrong)
