"""What is kept of analyses of a pair over several seeds, from records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import look_inside

MOE_KL, ENGRAM_KL = (2.0, 1.0, 0.0), (1.0, 0.5, 0.0)


def group(correct_on: int, correct_off: int) -> dict:
    scores = {name: {"accuracy": n / 40} for name, n in (("on", correct_on), ("off", correct_off))}
    about = {"task": "facts", "difficulty": "easy", "frequency": 4, "items": 40, "chance": 0.1}
    return about | scores


def run(folder: Path, name: str, loss: float, on: int, off: int) -> Path:
    workdir = folder / f"{name},rate=0.008"
    workdir.mkdir(parents=True)
    nats = {"nats_per_token": {"depth": loss, "unigram counts": 9.0}}
    (workdir / "losses.json").write_text(json.dumps({"held_out_loss": nats}))
    (workdir / "task_scores.json").write_text(json.dumps({"groups": [group(on, off)]}))
    return workdir


@pytest.fixture
def sweep(tmp_path):
    """Two seeds that have ended, and one of which only the MoE has."""
    folder = tmp_path / "sweep"
    for seed, (moe, engram) in enumerate([(4.0, 3.9), (4.1, 3.98)]):
        run(folder, f"variant=moe,seed={seed}", moe, on=8, off=8)
        workdir = run(folder, f"variant=engram,seed={seed}", engram, on=36, off=6 - 2 * seed)
        models = [{"kl": [k + seed / 10 for k in ENGRAM_KL[:-1]] + [0.0], "engram_layers": [1]}]
        models += [{"kl": list(MOE_KL), "engram_layers": []}]
        alike = {"cka": [[0.9, 0.5], [0.4, 0.8], [0.1, 0.2]], "soft_alignment": [0.5, 1.0 + seed]}
        parts = [("all layers", 0.5), ("layer 1", 0.5), ("layer 1, head 0 of the 2-grams", 0.1)]
        record = {
            "lens": {"models": models},
            "cka": alike | {"entities": "a rule", "entity_tokens": 256},
            "sensitivity": {
                "loss": engram,
                "parts": [{"part": name, "rise": rise + seed / 5} for name, rise in parts],
            },
        }
        (workdir / "analysis.json").write_text(json.dumps(record))
    run(folder, "variant=moe,seed=2", 4.2, on=8, off=8)
    return folder


def test_seeds_that_both_have(sweep):
    pairs = look_inside.ended_pairs(sweep)
    assert {seed: [run.name.split(",")[0] for run in pair] for seed, pair in pairs.items()} == {
        0: ["variant=moe", "variant=engram"],
        1: ["variant=moe", "variant=engram"],
    }


def test_the_page_and_the_numbers(sweep, tmp_path, monkeypatch):
    target = tmp_path / "kept"
    monkeypatch.setattr("sys.argv", ["look_inside", str(sweep), str(target)])
    look_inside.main()
    text = (target / "report.md").read_text()
    # half of the interval of two values: t of one degree of freedom, 12.706, times half their gap
    assert "| difference | -0.1100 ± 0.1271 |" in text
    assert "| 0 | 2.000 | 1.050 | -0.9500 ± 0.6353 |" in text
    assert "| 2 | 0.000 | 0.000 | 0.0000 ± 0.0000 |" in text
    assert "| 1 | 1.5000 ± 6.3531 |" in text  # Engram's layer 1 is like the MoE's 1 or 2
    assert "| all layers | +0.6000 ± 1.2706 |" in text and "head 0" not in text
    # 16, 72 and 10 of 80 items; sqrt(p (1 - p) / 80); (0.125 - 0.1) / (0.9 - 0.1)
    tasks = "| 80 | 20.0% ± 4.5% | 90.0% ± 3.4% | 12.5% ± 3.7% | 3% |"
    assert f"| facts easy, stated 4 times an epoch {tasks}" in text
    for name in ("lens", "cka", "sensitivity"):
        assert (target / f"{name}.png").read_bytes().startswith(
            b"\x89PNG"
        ) and f"({name}.png)" in text
    kept = json.loads((target / "analyses.json").read_text())
    assert kept["1"]["engram"]["held_out_loss"] == 3.98
    assert kept["0"]["sensitivity"]["parts"][2]["rise"] == 0.1  # heads, too


def test_nothing_to_compare(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["look_inside", str(tmp_path), str(tmp_path / "kept")])
    with pytest.raises(SystemExit, match="no seed for which both models have ended"):
        look_inside.main()
    assert not (tmp_path / "kept").exists()
