"""The report: the numbers it shows, where they come from, and files that stand alone."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engram_jax.config import Config, OptimizerConfig, TrainConfig, to_dict
from engram_jax.monitoring.metrics import MetricsWriter, json_value
from engram_jax.report.tables import curve, launch_rows, run_rows
from engram_jax.report.write import GateSample, write_report

STEPS = np.arange(10, 210, 10)
MODEL = {
    "total_params": 12_345_678,
    "active_params": 2_345_678,
    "flops_per_token": 8914704.0,
    "parts": {"routed experts": 12_000_000, "norms": 345_678},
    "engram": {"1": {"rows": 101, "dim": 16, "orders": [2, 3], "heads_per_order": 4}},
}
DATA = {
    "source": "standard library of Python 3.11.7",
    "digest": "0123456789abcdef",
    "python": "3.11.7",
    "train_documents": 351,
    "train_bytes": 7_140_000,
    "train_tokens": 2_188_698,
    "validation_documents": 19,
    "validation_bytes": 360_000,
    "validation_tokens": 115_520,
    "validation_bytes_per_token": 3.122,
}
GATES = GateSample(["def", " f", "(", "x", "):\n"], np.linspace(0.1, 0.9, 10).reshape(2, 5), [1, 3])


def losses(mine: float, **counts: float) -> dict:
    """losses.json after step 203; validation losses are lower by 0.25."""

    def of(text: str, batches: int, targets: int, less: float) -> dict:
        found = {name: value - less for name, value in {"tiny": mine, **counts}.items()}
        bits = {name: value / math.log(2) / 3.122 for name, value in found.items()}
        size = {"of": text, "batches": batches, "targets": targets}
        return {**size, "nats_per_token": found, "bits_per_byte": bits}

    return {
        "step": 203,
        "held_out_loss": of("the whole held-out split, 57 batches", 57, 114_880, 0.0),
        "validation_loss": of("the first 16 batches of the held-out split", 16, 32_411, 0.25),
        "data": DATA,
    }


def launch(step: int, commit: str, **found) -> dict:
    config = Config(
        train=TrainConfig(steps=203, log_every=10), optimizer=OptimizerConfig(peak_lr=0.004)
    )
    return {
        "time": f"2026-07-0{1 + step // 100}T10:00:00+00:00",
        "resumed_at": step,
        "command": "python launch.py --config=configs/tiny.py",
        "git": {"commit": commit, "dirty": step > 0},
        "versions": {"python": "3.11.7", "jax": "0.10.2", "tensorflow-datasets": None},
        "host": "here",
        "devices": {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1},
        "config": to_dict(config),
        "data": DATA,
        **found,
    }


def run(
    workdir: Path,
    steps=STEPS,
    *,
    memory: bool = True,
    experts: bool = True,
    loss=lambda step: 3 + 50 / step,
    found: dict | None = None,
    launches: list[dict] | None = None,
) -> Path:
    """The files of a run."""
    rng = np.random.default_rng(0)
    with MetricsWriter(workdir) as writer:
        for step in map(int, steps):
            values = {
                "loss": loss(step),
                "learning_rate": 0.004,
                "grad_norm": 50 / step,
                "tokens_per_second": 1000.0 + step,
                "step_seconds": 0.5,
                "goodput": 0.9,
            }
            if memory:
                values |= {"hit_rate/1": step / 400, "gate/1": np.array([0.25, 0.75])}
                values |= {"hit_rate/12": step / 500, "grad_norm_memory": 1 / step}
            if experts:
                values |= {f"expert_load/{n}": rng.dirichlet(np.ones(4)) for n in (2, 11)}
            writer.write(step, values)
            if step % 50 == 0 or len(steps) == 1:
                used = {"utilisation/1": 0.99963, "utilisation/12": 0.99964} if memory else {}
                value = loss(step) and 3.5 - (step == 150) / 2
                writer.write(step, {"validation_loss": value, **used})
    if found:
        (workdir / "losses.json").write_text(json.dumps(json_value(found)))
    begun = launches or [launch(0, "a" * 40)]
    (workdir / "run.json").write_text(json.dumps({"launches": begun}))
    return workdir


class Page(HTMLParser):
    """Tags, and the text outside <style>."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def pictures(workdir: Path) -> set[str]:
    return {path.stem for path in (workdir / "report").iterdir()}


def test_a_whole_report(tmp_path):
    found = losses(3.5, **{"bigram|counts": 3.75, "best ever": 1.0})
    path = write_report(
        run(tmp_path, found=found),
        title="tiny",
        model=MODEL,
        gates=GATES,
        samples=[("def ", "f(x):\n    return '<b>'\n")],
    )
    assert path == tmp_path / "report.html"
    source, markdown = path.read_text(), (tmp_path / "report.md").read_text()
    page = Page(source)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    assert all(src.startswith("data:image/png;base64,") for src in images)
    assert not re.search(r"(src|href)=.(https?:|/|\.)", source)  # stands alone
    assert [tag for tag, _ in page.tags].count("b") == 1  # the prompt; the sample's <b> is text
    assert "f(x):\n    return '<b>'" in page.text
    linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(linked) == 5
    for name in linked:
        with Image.open(tmp_path / name) as image:
            assert image.width > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not an empty canvas
    assert markdown.startswith(
        "# tiny\n\n12.35 M parameters, 203 steps, standard library of Python"
    )
    assert "commit aaaaaaaaaaaa\n" in markdown
    bits = 3.5 / math.log(2) / 3.122
    for line in (
        f"| tiny | 3.5000 | {math.exp(3.5):.2f} | {bits:.4f} |  |",
        f"| bigram\\|counts | 3.7500 | {math.exp(3.75):.2f} |",
        "| the model is 0.2500 below |",
        "| the model is 2.5000 above |",
        "held_out_loss after step 203: the whole held-out split, 57 batches, 114,880 predicted",
        "Validation: the first 16 batches of the held-out split, 32,411 predicted tokens; dashed:",
        "| steps | 203 |",
        "| parameters | 12,345,678 |",
        "| memory at layer 1 | 101 rows of 16 | n-grams of 2 and 3, 4 heads each |",
        "| digest of the text | 0123456789abcdef |",
        "| to train on | 351 documents, 7.14 MB, 2,188,698 tokens |",
        f"| commit | {'a' * 40} |",
        "| command | python launch.py --config=configs/tiny.py |",
        "| versions | python 3.11.7, jax 0.10.2 |",
        "| optimizer.peak_lr | 0.004 | 0.0004 |",
        "| model.norm_eps | 1e-06 |  |",
    ):
        assert line in markdown
        assert line.startswith("|") or line[:40] in page.text


def test_run_rows_are_the_steps_done_and_the_losses_by_their_definitions(tmp_path):
    """20 of 203 steps are logged; the last of them is not the number of steps."""
    records = [
        {"step": 2, "loss": 4.0, "tokens_per_second": 100.0},
        {"step": 4, "loss": 3.0, "tokens_per_second": 300.0},
        {"step": 4, "validation_loss": 3.25},
        {"step": 6, "loss": 2.0, "tokens_per_second": 200.0},
        {"step": 6, "validation_loss": 3.5},
        {"step": 6, "validation_loss": 3.375},
    ]
    found = curve(records, "validation_loss")
    assert found.steps.tolist() == [4, 6]
    assert found.values.tolist() == [3.25, 3.375]
    config = to_dict(Config(train=TrainConfig(steps=400)))
    assert dict(run_rows(records, losses(3.5), {"config": config})) == {
        "steps": "203 of 400",
        "tokens": "831,488 in batches of 4,096",
        "validation loss, last": "3.3750 after step 6; the first 16 batches of the held-out split,"
        " 32,411 predicted tokens",
        "validation loss, lowest": "3.2500 after step 4",
        "training loss, last": "2.0000, of the batch of step 6",
        "tokens per second, median": "200",
    }
    assert dict(run_rows(records, {}, {}))["steps"] == "6"


ALL = {"loss", "optimisation", "memory", "experts"}
EDGES = {
    "one logged step": ({"steps": [1]}, ALL),
    "no memory, no experts": ({"memory": False, "experts": False}, {"loss", "optimisation"}),
    "not finite": ({"loss": lambda step: math.nan, "found": losses(math.nan, bigram=4.0)}, ALL),
}


@pytest.mark.parametrize("case", EDGES)
def test_a_report_of_less(tmp_path, case, monkeypatch):
    monkeypatch.setattr("engram_jax.report.figures._DPI", 40)  # quick
    files, expected = EDGES[case]
    workdir = run(tmp_path, **{"found": losses(3.5), **files})
    write_report(workdir, title="tiny")
    assert pictures(workdir) == expected
    markdown = (workdir / "report.md").read_text()
    assert "count models" not in markdown.lower() or "bigram" in markdown
    assert ("| tiny | nan | nan | nan |" in markdown) == (case == "not finite")


def test_a_launch_that_made_no_step_is_not_the_run_s(tmp_path):
    """The same command again, by other code: what is shown is of the launch before it."""
    both = [launch(0, "a" * 40), launch(203, "b" * 40, command="python launch.py --again")]
    write_report(run(tmp_path, found=losses(2.5), launches=both), title="tiny")
    text = (tmp_path / "report.md").read_text()
    assert f"commit {'a' * 12}" in text and "| command | python launch.py --config" in text
    assert "b" * 12 not in text and "--again" not in text


def test_a_resumed_run_shows_its_launches():
    changed = {"changed_settings": {"optimizer.peak_lr": [0.003, 0.004]}}
    rows = launch_rows([launch(0, "a" * 40), launch(100, "b" * 40, **changed)])
    assert rows[1:3] == (
        ("commit", "b" * 40 + " with changes"),
        ("started", "2026-07-02T10:00:00+00:00 at step 100"),
    )
    assert rows[5:] == (
        ("started before", f"2026-07-01T10:00:00+00:00 at step 0, commit {'a' * 40}"),
        ("changed at step 100", "optimizer.peak_lr"),
    )
    assert dict(launch_rows([launch(0, "") | {"git": None}]))["commit"] == "unknown"


def test_a_report_of_nothing(tmp_path):
    path = write_report(tmp_path, title="nothing <yet>", model=MODEL)
    assert "<h1>nothing &lt;yet&gt;</h1>" in path.read_text()
    assert "<td>parameters</td><td>12,345,678</td>" in path.read_text()
    assert pictures(tmp_path) == set()


def test_synthetic_tasks_are_shown_where_they_were_scored(tmp_path):
    accuracy = {"accuracy": 0.9, "standard_error": 0.03}
    gone = {"accuracy": 0.3, "standard_error": 0.046}
    group = {"task": "facts", "difficulty": "easy", "frequency": 64, "items": 100, "chance": 0.1}
    group |= {"on": accuracy, "on_greedy": accuracy, "off": gone, "off_greedy": gone}
    scores = {"step": 203, "epochs": 1.5, "off_layers": [1, 3], "too_long": 0}
    write_report(tmp_path, title="tiny")
    assert "Synthetic tasks" not in (tmp_path / "report.md").read_text()
    text = json.dumps(scores | {"groups": [group | {"retained": 0.25}]})
    (tmp_path / "task_scores.json").write_text(text)
    write_report(tmp_path, title="tiny")
    shown = (tmp_path / "report.md").read_text()
    assert "Synthetic tasks" in shown and "1.50 epochs" in shown and "layers 1, 3" in shown
    assert "| facts | easy | 64 | 100 | 10.0% | 90.0% ±3.0%" in shown and "25%" in shown
