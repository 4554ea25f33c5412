"""benchmarks.meshes: its candidates, what it records, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import meshes
from benchmarks.meshes import CANDIDATES, Candidate
from engram_jax.aot import compile_step
from engram_jax.aot.topology import parse_topology
from engram_jax.config.errors import UserError
from engram_jax.sharding import rules

TINY = ("engram_tiny", "v5e:2x2")
FAST, SLOW, *_ = CANDIDATES[TINY]


@pytest.mark.parametrize(("config", "slice_name"), CANDIDATES)
def test_candidates_fit_the_slice_and_the_model(config, slice_name):
    candidates = CANDIDATES[config, slice_name]
    assert len({c.name for c in candidates}) == len(candidates) >= 5
    for candidate in candidates:
        asked = candidate.of(config)
        axes = rules.axes_for(asked.mesh, math.prod(parse_topology(slice_name)[1]))
        rules.check(asked, axes)
        assert (axes.fsdp, asked.train.accumulation) == (candidate.fsdp, candidate.accumulation)


@pytest.mark.parametrize("config", ["engram27b", "engram40b", "moe27b", "dense4b"])
def test_the_shipped_mesh_is_among_them(config):
    assert meshes.shipped(config, "v5p:4x4x8") in CANDIDATES[config, "v5p:4x4x8"]


def test_names():
    candidate = Candidate(data=2, fsdp=16, expert=8, accumulation=2)
    assert candidate.name == "data 2 x fsdp 16 x expert 8, 2 microbatches"
    assert candidate.short == "data2xfsdp16xexpert8 acc2"
    assert Candidate(fsdp=4).name == "fsdp 4, 1 microbatch"


ONE_COPY = """HloModule m

ENTRY %main () -> f32[] {
  %rows = f32[8192,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.1 = f32[8192,128]{1,0:T(8,128)} copy(%rows)
}
"""


def report(fits: bool) -> dict:
    sizes = {"peak_hbm_bytes": 3 << 30, "hbm_capacity_bytes": 4 << 30, "compile_seconds": 1.5}
    told = {} if fits else {"message": "too much"}
    return {"global_batch_tokens": 4096, "devices": 4, "fits": fits, **sizes, **told}


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_recorded(monkeypatch, fits):
    def compiled(config, slice_name, dump):
        assert (config.mesh.fsdp, slice_name) == (4, TINY[1])
        (dump / "x.after_codegen.txt").write_text(ONE_COPY)
        return report(fits)

    monkeypatch.setattr(compile_step, "compile_step", compiled)
    found = meshes.compile_candidate(*TINY, FAST)
    assert meshes.key(found) == (*TINY, FAST.name, *meshes.versions().values())
    assert (found["fits"], found["tokens_per_device"]) == (fits, 1024)
    assert (found["peak_hbm_bytes"], found["compile_seconds"]) == (3 << 30, 1.5)
    if fits:
        expected = 2 * 8192 * 128 * 4 / 819e9
        assert found["prediction"]["sum_s"] == pytest.approx(expected, abs=1e-6)
    else:
        assert "prediction" not in found and found["message"] == "too much"


def test_a_mesh_that_is_refused_is_recorded(monkeypatch):
    def refused(*args, **kwargs):
        raise UserError("config.data.batch_size = 1: must be a multiple of 2")

    monkeypatch.setattr(compile_step, "compile_step", refused)
    found = meshes.compile_candidate(*TINY, FAST)
    assert not found["fits"] and "multiple of 2" in found["message"]


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    file, compiled = tmp_path / "meshes.json", []

    def compile_it(config, slice_name, candidate):
        compiled.append(candidate)
        if len(compiled) == 2:
            return None  # broke
        label = {"config": config, "slice": slice_name, "candidate": candidate.name}
        seconds = float(10 - len(compiled))
        names = ("matmul_s", "elementwise_lower_s", "elementwise_upper_s", "kernels_s")
        names += ("collectives_s", "collectives_total_GB", "sum_s", "sum_upper_s")
        record = label | meshes.versions() | report(True)
        return record | {"prediction": dict.fromkeys(names, seconds)}

    monkeypatch.setattr(meshes, "compile_in_a_process", compile_it)
    arguments = ["meshes", "--config", TINY[0], "--slice", TINY[1], "--json", str(file)]
    monkeypatch.setattr("sys.argv", arguments)
    candidates = list(CANDIDATES[TINY])
    assert meshes.main() == 1  # one is missing
    assert compiled == candidates
    assert len(json.loads(file.read_text())["records"]) == len(candidates) - 1
    assert meshes.main() == 0
    assert compiled == [*candidates, candidates[1]]

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*arguments, "--table"])
    assert meshes.main() == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    marked = meshes.shipped(*TINY).name
    expected = [candidates[1], *reversed(candidates[2:]), candidates[0]]  # fastest first
    assert names == [c.name + " (shipped)" * (c.name == marked) for c in expected]
    assert len(compiled) == len(candidates) + 1


def test_only_some_candidates(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(meshes, "compile_in_a_process", lambda *args: compiled.append(args[2]))
    for only in ("fsdp4 acc2", "fsdp 4, 2"):
        meshes.sweep(*TINY, only, tmp_path / "none.json")
    assert compiled == [SLOW, SLOW]
    with pytest.raises(UserError, match="no candidate"):
        meshes.sweep(*TINY, "fsdp5", tmp_path / "none.json")


def test_the_table_of_what_has_no_prediction():
    label = {"config": "a", "slice": "b"}
    rows = meshes.table(
        [
            label | {"candidate": "small", "fits": False, "message": "a|b"},
            label | {"candidate": "large", "message": "too much"} | report(False),
        ],
        "large",
    ).splitlines()[2:]
    assert rows[0].startswith("| large (shipped) | 3.0 of 4.0 | does not fit |")
    assert rows[1].startswith("| small | – | a/b |")
