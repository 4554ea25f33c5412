"""README's and the tutorial's commands for your own text, run one after the other in one folder."""

from __future__ import annotations

import pytest

from tests.runs import ROOT, SMALL, flags_of, launched
from tests.test_docs import commands

# Sequences that hold the documented prompts and answers; the text is what the command names.
TINY = {key: value for key, value in SMALL.items() if not key.startswith("data.")} | {
    "data.seq_len": 64,
    "data.batch_size": 4,
    "data.max_megabytes": 1,
    "generate.max_tokens": 8,
    "train.steps": 3,
    "train.eval_every": 3,
    "train.count_models": False,
}


@pytest.mark.slow
def test_they_run_in_one_folder(tmp_path, monkeypatch):
    """What trains is made small; what serves (tests/serve/) is left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    for name in ("configs", "engram_jax", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    ran = []
    for page in ("README.md", "docs/tutorial.md", "docs/training.md"):
        for arguments in commands(page):
            given = " ".join(arguments)
            own_text = "--config.name=" in given or "--workdir=runs/m" in given
            if not own_text or "--mode=serve" in given:
                continue
            if "--mode" not in given:
                places = [a.replace("/path/to/text", str(ROOT / "docs")) for a in arguments]
                arguments = [*places, *flags_of(TINY)]
            if "--mode=count-memory" in given:
                arguments = [*arguments, "--tokens=2000"]
            outcome = launched(*arguments)
            assert outcome.code == 0, (page, arguments, outcome.err)
            ran.append(given)
    assert len(ran) >= 8
    assert (tmp_path / "runs" / "tuned" / "report.html").is_file()
    # A third text in the folder of the second: told which text is there, and what to give.
    (first,) = [a for a in commands("docs/tutorial.md") if "--config.name=mine" in a]
    other = [a.replace("=engram_jax", f"={ROOT / 'docs'}") for a in first]
    outcome = launched(*other, *flags_of(TINY))
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert "the run there was trained on another text: engram_jax (" in line
    assert "give another --workdir (or --config.name, which names it)" in line
