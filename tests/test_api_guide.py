"""docs/api_guide.md: its code runs, in one session, and prints what the page says."""

from __future__ import annotations

import contextlib
import doctest
import io
import re

import pytest

from tests.runs import ROOT

PAGE = ROOT / "docs" / "api_guide.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.proof
def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    """`...` on the page stands for anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    session: dict[str, object] = {"__name__": "notebook"}
    printed, compared = "", 0
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, str(PAGE), "exec"), session)
            printed = out.getvalue()
            continue
        same = doctest.OutputChecker().check_output(text, printed, doctest.ELLIPSIS)
        assert same, f"the page says\n{text}\nand it prints\n{printed}"
        compared += 1
    assert compared == 12
