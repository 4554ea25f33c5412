"""What is kept of a sweep, and that a sweep can go on from it."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest

from scripts.keep_sweep import PACKED, keep, restore


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def sweep(tmp_path):
    """Two runs that have ended, one of them diverged, and one that has not."""
    folder = tmp_path / "sweep"
    command = "/home/someone/env/bin/python launch.py --config=a.py:x=1"
    for name, diverged in (("x=1", False), ("x=2", True), ("x=3", False)):
        launch = {"command": command, "directory": "/home/someone", "host": "box", "cpus": 2}
        launches = [launch | {"environment": {"CACHE": "/home/someone/cache", "SECONDS": "0"}}]
        write(folder / name / "run.json", {"launches": launches})
        write(folder / name / "checkpoints/1/data", "large")
        attempt = {"host": "box", "command": command, "seconds": 3.5, "diverged": diverged}
        write(folder / f"logs/{name}.json", [attempt])
        write(folder / f"logs/{name}.log", "what it printed")
    write(folder / "x=1/losses.json", {"step": 4})
    for name in ("task_scores", "analysis"):
        write(folder / f"x=1/{name}.json", {"of": name})
    np.savez(folder / "x=1/held_out_documents.npz", nats=np.arange(3.0))
    write(folder / "report.md", "# Report")
    write(folder / "x.svg", "<svg/>")
    return folder


def test_round_trip(sweep, tmp_path, capsys):
    keep(sweep, tmp_path / "kept")
    assert "2 runs" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {PACKED, "report.md", "x.svg"}
    with tarfile.open(tmp_path / "kept" / PACKED) as archive:
        names = set(archive.getnames())
    runs = {"x=1/run.json", "x=1/losses.json", "x=1/held_out_documents.npz", "x=2/run.json"}
    runs |= {"x=1/task_scores.json", "x=1/analysis.json"}
    assert names == runs | {f"logs/x={n}.json" for n in (1, 2, 3)}
    write(tmp_path / "again/x=1/losses.json", {"step": 5})  # there already: stays
    restore(tmp_path / "kept", tmp_path / "again")
    assert json.loads((tmp_path / "again/x=1/losses.json").read_text()) == {"step": 5}
    found = json.loads((tmp_path / "again/x=2/run.json").read_text())
    launch = {"command": "python launch.py --config=a.py:x=1", "host": "", "cpus": 2}
    assert found == {"launches": [launch | {"environment": {"CACHE": "cache", "SECONDS": "0"}}]}
    with np.load(tmp_path / "again/x=1/held_out_documents.npz") as kept:
        assert kept["nats"].tolist() == [0, 1, 2]
    (attempt,) = json.loads((tmp_path / "again/logs/x=2.json").read_text())
    assert attempt["diverged"] and attempt["seconds"] == 3.5 and "someone" not in str(attempt)


def test_nothing_has_ended(tmp_path):
    with pytest.raises(SystemExit, match="no run in it has ended"):
        keep(tmp_path, tmp_path / "kept")
