"""Every cell of every notebook, from the install cell on: at tiny settings, and as they are.

python -m pytest tests/colabs -m proof          # tiny
python -m pytest tests/colabs -m slow -s -k shipped   # as a reader runs them; prints times
"""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from engram_jax.addressing import LayerAddressing
from tests.colabs.notebooks import NAMES, Ran, run
from tests.oracle import engram as oracle
from tests.runs import ROOT

# A model and a text of the repository's own for seconds.
MODEL = {
    "tokenizer.vocab_size": 512,
    "model.d_model": 32,
    "model.layers": 2,
    "model.attention.heads": 2,
    "model.attention.kv_lora_rank": 16,
    "model.attention.nope_dim": 8,
    "model.attention.rope_dim": 8,
    "model.attention.v_dim": 8,
    "model.hyper.streams": 2,
    "model.hyper.sinkhorn_iterations": 2,
    "model.ffn.dense_dim": 64,
    "model.ffn.routed_experts": 4,
    "model.ffn.top_k": 2,
    "model.ffn.expert_dim": 16,
    "data.source": "folder",
    "data.path": "engram_jax/layers",
    "data.validation_fraction": 0.2,
    "data.seq_len": 64,
    "data.batch_size": 8,
    "optimizer.warmup_steps": 5,
    "optimizer.peak_lr": 0.01,
}
MEMORY = {
    "model.engram.layers": (1,),
    "model.engram.heads_per_order": 2,
    "model.engram.rows_per_head": (401,),
    "model.engram.d_mem": 32,
}


FEWER = {"train.eval_every": 15, "train.samples": ()}  # each compiles a program


def flags(values) -> list[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def told(name: str, ran: Ran) -> None:
    times = f"{ran.seconds:.0f} s, {ran.processor_seconds:.0f} s of processor time"
    print(f"\n{name}: {times}; seconds of cells: {ran.slowest()}")


@pytest.fixture(name="run_tiny")
def _run_tiny(tmp_path, quick):
    def start(name: str, settings, wanted) -> Ran:
        ran = run(name, tmp_path, quick, settings, wanted)
        told(name, ran)
        return ran

    return start


pytestmark = pytest.mark.slow


@pytest.mark.proof
def test_one_token(run_tiny):
    """The addresses that are shown are those of the oracle, for the ids that are shown."""
    ran = run_tiny(
        "a_one_token",
        {"STEPS": 6, "CHANGES": MODEL | MEMORY},
        {
            "t": "t",
            "canonical": "x.tolist()",
            "addresses": "addresses.tolist()",
            "plan": "__import__('dataclasses').asdict(plan)",
            "losses": "losses.tolist()",
            "gates": "gates.tolist()",
            "shares": "shares",
            "moved": "float(np.abs(Y - gated).max())",
        },
    )
    found = ran.found
    plan = LayerAddressing(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in found["plan"].items()}
    )
    wanted = oracle.hash_rows(found["canonical"], plan, plan.fill_id)
    assert found["addresses"] == wanted.tolist()
    shown = re.findall(r"\*\*([\d,]+)\*\* \|$", ran.shown("hash"), re.MULTILINE)
    assert [int(row.replace(",", "")) for row in shown] == wanted[found["t"]].tolist()
    assert f"| {found['canonical'][found['t']]} |" in ran.shown("canonical")
    assert ran.shown("same").count("the same") == 2  # in other texts, in capitals
    assert found["losses"][-1] < found["losses"][0]
    assert np.min(found["gates"]) > 0 and np.max(found["gates"]) < 1 and found["moved"] > 0
    assert found["shares"][0] > 0.5 > found["shares"][-1]  # what the heads together tell apart
    assert ran.pictures() == 5


def test_the_tiny_model_and_its_report(run_tiny):
    settings = {"STEPS": 30, "MORE": flags(MODEL | MEMORY | FEWER)}
    wanted = {"first": "metrics[0]['loss']", "held_out": "held_out", "off": "off.loss"}
    ran = run_tiny("b_train_tiny", settings, wanted)
    folder = ran.checkout / "runs" / "colab_b"
    losses = json.loads((folder / "losses.json").read_text())["held_out_loss"]["nats_per_token"]
    assert ran.found["held_out"] == losses and losses["colab_b"] < ran.found["first"] - 0.5
    assert (folder / "report.html").stat().st_size > 100_000
    assert f"| {losses['colab_b']:.4f} |" in (folder / "report.md").read_text()
    assert "\ndef main(" in ran.shown("generate")
    assert "P_tot" in ran.shown("describe") and "Kneser-Ney" in ran.shown("loss")
    for cell in ("context", "memory", "gates", "experts"):
        assert len(ran.shown(cell)) > 50, cell
    assert ran.found["off"] != losses["colab_b"]
    assert ran.pictures() == 4  # the loss, and three of the report


def test_the_allocation_law(run_tiny):
    """What was trained has the parameters that the solver says, and the base's."""
    budget = MODEL | {"model.ffn.routed_experts": 60, "model.ffn.dense_dim": 512}
    memory = MEMORY | {"model.engram.d_mem": 8}
    network = "{k: v for k, v in state.params.items() if k not in ('embedding', 'head')}"
    sizes = "c.model.ffn.routed_experts, c.model.engram.rows_per_head[0], c.model.ffn.dense_dim"
    ran = run_tiny(
        "c_allocation",
        {"BUDGET": budget, "MEMORY": memory, "RHOS": (0.9, 0.6), "STEPS": 12},
        {
            "sizes": f"{{r: ({sizes}) for r, c in solved.items()}}",
            "budgets": "{r: (b.total, b.active, b.rho) for r, b in budgets.items()}",
            "network": f"sum(x.size for x in __import__('jax').tree.leaves({network}))",
            "rows": "sum(table.rows.size for table in state.memory.values())",
            "held_out": "{r: found.loss for r, found in held_out.items()}",
            "losses": "{r: values.tolist() for r, values in losses.items()}",
            "drawn": "drawn",
        },
    )
    found = ran.found
    total, active, _ = found["budgets"]["1.0"]
    assert list(found["sizes"]) == ["1.0", "0.9", "0.75", "0.6"]
    for rho, (experts, rows, width) in found["sizes"].items():
        mine = found["budgets"][rho]
        assert abs(mine[0] / total - 1) < 1e-3 and abs(mine[1] / active - 1) < 1e-3
        assert mine[2] == pytest.approx(float(rho), abs=0.02)
        if rho != "1.0":
            assert f"| {experts} | {rows:,} | {width} |" in ran.shown("solve")
    assert found["network"] + found["rows"] == found["budgets"]["0.75"][0]
    # An expert has 3 matrices of 32 x 16, a token uses two; what is left of P_sparse are the rows.
    idle = (found["sizes"]["0.75"][0] - 2) * 3 * 32 * 16
    assert found["rows"] == found["budgets"]["0.75"][0] - found["budgets"]["0.75"][1] - idle
    assert list(found["losses"]) == list(found["held_out"]) == ["1.0", "0.75"]
    assert all(values[-1] < values[0] for values in found["losses"].values())
    assert "rho = 0.999: must be from" in ran.shown("impossible")
    for name, points in found["drawn"].items():
        with (ROOT / "docs" / "results" / name / "results.csv").open(newline="") as lines:
            kept = [row for row in csv.DictReader(lines) if row["used"] == "True"]
        drawn = [(rho, loss) for rho, values in points for loss in values]
        assert sorted(drawn) == sorted((float(r["rho"]), float(r["held_out_loss"])) for r in kept)
    assert "allocation" in found["drawn"] and ran.pictures() == 3


@pytest.mark.proof
def test_knowledge_on_and_off(run_tiny):
    # Little text, nine times as much of facts: an epoch is read more than once.
    more = {"data.path": "configs", "data.tasks.share": 0.9, "train.eval_every": 1000}
    more |= {"train.checkpoint_every": 1000, "data.tasks.test_items": 20}
    ran = run_tiny(
        "d_knowledge",
        {"STEPS": 200, "FREQUENCIES": (1, 60), "MORE": flags(MODEL | MEMORY | more)},
        {
            "groups": "groups",
            "before": "before",
            "rises": "rises",
            "kept": "kept.tolist()",
            "lost": "lost.tolist()",
            "slots": "slots[orders[0]].tolist()",
            "answers": "{row: answer.hits for row, answer in answers.items()}",
        },
    )
    found = ran.found
    often = next(group for group in found["groups"] if group["frequency"] == 60)
    error = max(often["on"]["standard_error"], 0.3 / np.sqrt(often["items"]))
    assert often["on"]["accuracy"] > often["chance"] + 3 * error
    assert often["off"]["accuracy"] < often["on"]["accuracy"] - error
    assert found["rises"]["answers of facts"][0] > max(0.5, found["rises"]["ordinary text"][0])
    change = np.array(found["lost"]) - np.array(found["kept"])
    assert change[0] > 0 and change[0] > 3 * np.mean(change[1:])
    assert [int(row) for row in found["answers"]] == found["slots"]
    assert min(found["answers"].values()) >= 60  # the fact's own statements
    assert ran.pictures() == 4


def test_from_laptop_to_slice(run_tiny, tpu_slice):
    more = flags(MODEL | {"train.eval_every": 1000, "train.checkpoint_every": 1000})
    ran = run_tiny(
        "e_tpu_slice",
        {"STEPS": 60, "STOP": 10, "DEVICES": 2, "LARGE_ROWS": 300_000, "MORE": more},
        {"report": "report", "launches": "len(launches)", "at": "resumed_at", "losses": "losses"},
    )
    report, steps = ran.found["report"], [step for step, _ in ran.found["losses"]]
    assert report["fits"] and report["table_sized_copies"] == 0 and report["aliased_fraction"] == 1
    # float32 rows and two moments: 8 heads of 80 numbers, a quarter of them on each of 4 chips.
    assert report["state_bytes"]["tables"] == pytest.approx(8 * 300_000 * 80 * 4 / 4, rel=0.01)
    assert report["state_bytes"]["table_moments"] == 2 * report["state_bytes"]["tables"]
    assert f"peak {report['peak_hbm_bytes'] / 2**30:.2f} of" in ran.shown("chip")
    assert "| all-to-all |" in ran.shown("traffic")
    assert ran.found["launches"] == 2 and 10 <= ran.found["at"] < 60
    assert steps == sorted(set(steps)) and steps[-1] == 60
    assert "the same command goes on" in ran.shown("launch")
    assert f"resumed from step {ran.found['at']}" in ran.shown("resume")
    assert "gcloud compute tpus queued-resources create mine" in ran.shown("slice")
    assert ran.pictures() == 2


@pytest.mark.parametrize("name", NAMES)
def test_as_shipped(name, tmp_path, shipped):
    """Every value of the settings cell as it is. Times: colabs/README.md."""
    ran = run(name, tmp_path, shipped, timeout=3600)
    told(name, ran)
    assert ran.pictures() >= 2
