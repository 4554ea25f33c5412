"""benchmarks.predicted: goes on where it stopped, and says why a step is slower than its record."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import predicted
from engram_jax.aot.topology import parse_topology
from tests.runs import ROOT

PREDICTED = {
    "seconds": [1.0, 2.0],
    "by_part": {"matmul": [0.5, 0.5], "elementwise": [0.25, 1.25], "collectives": [0.25, 0.25]},
    "places": [{"name": "jit(step)/dot", "lines": ["layers/linear.py:41"]}],
    "tokens_per_s": [1e6, 2e6],
    "utilisation": [0.25, 0.5],
    "overlap": {"collectives": {"exposed_s": [0.2, 0.1]}},
}
REPORT = {
    "fits": True,
    "peak_hbm_bytes": 3 << 30,
    "hbm_capacity_bytes": 4 << 30,
    "compile_seconds": 1.5,
    "mesh": {"fsdp": 128},
    "accumulation": 1,
    "global_batch_tokens": 4096,
    "predicted": PREDICTED,
}


def test_every_configuration_on_every_generation():
    generations = {parse_topology(s)[0].name for _, s in predicted.CASES}
    assert generations == {"v5e", "v5p", "v6e", "tpu7x"}
    large = {f.stem for f in (ROOT / "configs").glob("*[0-9]b.py")}
    assert {name for name, _ in predicted.CASES} == large | {predicted.SHORT[0]}
    assert len(set(predicted.CASES)) == 1 + 4 * len(large)
    flags = predicted.flags_of(predicted.SHORT)
    assert flags[0].endswith("configs/engram27b.py")
    assert flags[1:4] == ["--mode=compile", "--topology=v5p:4x4x8", "--json"]
    assert "--config.model.engram.layers=(1,)" in flags


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    file, compiled = tmp_path / "predicted.json", []

    def compile_it(case):
        compiled.append(case)
        return None if len(compiled) == 2 else REPORT

    monkeypatch.setattr(predicted, "compile_case", compile_it)
    arguments = ["predicted", "--config", "moe27b", "--json", str(file)]
    monkeypatch.setattr("sys.argv", arguments)
    of_moe = [("moe27b", s) for s in predicted.SLICES]
    assert predicted.main() == 1 and compiled == of_moe  # one broke
    assert predicted.main() == 0 and compiled == [*of_moe, of_moe[1]]
    monkeypatch.setattr("sys.argv", [*arguments, "--slice", of_moe[0][1], "--again"])
    assert predicted.main() == 0 and compiled[-1] == of_moe[0]
    records = json.loads(file.read_text())["records"]
    assert sorted((r["config"], r["slice"]) for r in records) == sorted(of_moe)
    assert records[0]["predicted"] == PREDICTED and records[0]["mesh"] == {"fsdp": 128}

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*arguments, "--table"])
    assert predicted.main() == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == list(predicted.SLICES)
    expected = "3.0 of 4.0 | 1.00 .. 2.00 | 1,000,000 .. 2,000,000 | 25 .. 50 | 0.10 .. 0.20 |"
    assert rows[0].endswith(expected)
    monkeypatch.setattr("sys.argv", [*arguments, "--slice", "v5p:2x2x1"])
    with pytest.raises(SystemExit):
        predicted.main()
    assert "moe27b on v6e:16x16" in capsys.readouterr().err


def test_what_does_not_fit_has_no_seconds():
    record = predicted.record_of(predicted.CASES[1], {**REPORT, "fits": False, "predicted": None})
    assert predicted.table([record]).splitlines()[-1].endswith("| does not fit | | | |")


def test_a_slower_step_is_told_with_the_reason():
    now = copy.deepcopy(PREDICTED)
    assert predicted.slower(PREDICTED, now) == ""
    now["by_part"]["matmul"] = [0.52, 0.52]
    now["seconds"] = [1.02, 2.02]
    assert predicted.slower(PREDICTED, now) == ""  # 2 %
    now["by_part"]["collectives"] = [0.35, 0.35]
    now["seconds"] = [1.12, 2.12]
    now["places"] = [{"name": "jit(step)/all_gather", "lines": ["layers/moe.py:7", "block.py:3"]}]
    found = predicted.slower(PREDICTED, now)
    assert "12.0% slower" in found and "more than 3%" in found
    assert "collectives +0.1 s, matmul +0.02 s" in found
    assert "new among the costliest: layers/moe.py:7 < block.py:3" in found
    now["seconds"] = [0.9, 1.8]
    assert predicted.slower(PREDICTED, now) == ""
