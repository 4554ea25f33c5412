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
    told = repository_address.address() == repository_address.PLACEHOLDER
    pages = [(ROOT / "README.md").read_text(), *(read(name).cells[0].source for name in NAMES)]
    for page in pages:
        assert ("is a placeholder until the repository is published" in page) == told


def test_one_command_changes_all_of_them(tmp_path):
    (tmp_path / "colabs").mkdir()
    for file in repository_address.files():
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    old, new = repository_address.address(), "somebody/another.name"
    counts = [file.read_text().count(old) for file in repository_address.files()]
    changed = repository_address.replace(new, tmp_path)
    assert len(changed) == len(counts) - counts.count(0) and len(changed) >= 7
    assert repository_address.address(tmp_path) == new
    for file, count in zip(repository_address.files(tmp_path), counts, strict=True):
        assert file.read_text().count(old) == 0 and file.read_text().count(new) == count
    assert repository_address.replace(old, tmp_path) == changed  # and back, to the byte
    for file in repository_address.files():
        assert (tmp_path / file.relative_to(ROOT)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("wrong", [["no-slash"], ["a/b/c"], ["a/b", "c/d"]])
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(SystemExit, match="usage:"):
        repository_address.main(wrong)
