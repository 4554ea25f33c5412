"""The report: the numbers it shows, the pictures' contents, and files that stand alone."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from engram_jax.metrics import MetricsWriter
from engram_jax.report import GateSample, curve, key_figures, write_report
from engram_jax.report_figures import Curve, expert_figure, gate_figure, loss_figure, smooth

STEPS = np.arange(10, 210, 10)


@pytest.fixture
def workdir(tmp_path):
    rng = np.random.default_rng(0)
    with MetricsWriter(tmp_path) as writer:
        for step in STEPS:
            values = {
                "loss": 3 + 50 / step,
                "tokens_per_second": 1000.0 + step,
                "step_seconds": 0.5,
                "expert_load": rng.dirichlet(np.ones(4), size=3),
                "hit_rate/1": step / 400,
                "gate/1": np.array([0.25, 0.75]),
            }
            writer.write(int(step), values)
            if step % 50 == 0:
                writer.write(int(step), {"validation_loss": 3.5 - (step == 150) / 2})
    return tmp_path


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


def test_a_whole_report(workdir):
    tokens = ["def", " f", "(", "x", "):\n", "    ", "return", " x", "\n"]
    path = write_report(
        workdir,
        title="tiny <1>",
        figures={"total parameters": 12345678, "tokenizer": "a|b"},
        baselines={"bigram": 3.75, "best ever": 1.0},
        gates=GateSample(tokens, np.linspace(0.1, 0.9, 18).reshape(2, 9), [1, 4]),
        samples=[("def ", "f(x):\n    return '<b>'\n")],
    )
    assert path == workdir / "report.html"
    source, markdown = path.read_text(), (workdir / "report.md").read_text()
    page = Page(source)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(src.startswith("data:image/png;base64,") for src in images)
    assert not re.search(r"(src|href)=.(https?:|/|\.)", source)  # stands alone
    assert "b" in [tag for tag, _ in page.tags]  # the prompt; the sample's own <b> is text
    assert [tag for tag, _ in page.tags].count("b") == 1
    assert "f(x):\n    return '<b>'" in page.text
    linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(linked) == 4
    for name in linked:
        with Image.open(workdir / name) as image:
            assert image.width > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not an empty canvas
    for text in (page.text, markdown):
        for shown in ("12,345,678", "3.7500; the model is 0.2500 below", "2.5000 above"):
            assert shown in text
    assert "| tokenizer | a\\|b |" in markdown
    assert markdown.startswith("# tiny <1>\n")


def test_a_report_without_metrics(tmp_path):
    path = write_report(tmp_path, title="nothing yet", figures={"steps": 0})
    assert "<td>steps</td><td>0</td>" in path.read_text()
    assert list((tmp_path / "report").iterdir()) == []


def test_curves_and_key_figures():
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
    rows = dict(key_figures(records, {"x": 0.123456, "y": True}, {"unigram": 5.0}))
    assert rows == {
        "validation loss at the end": "3.3750 nats per token",
        "lowest validation loss": "3.2500 at step 4",
        "unigram on the same tokens": "5.0000; the model is 1.6250 below",
        "training loss, last records": "3.0000",
        "steps": "6",
        "tokens per second": "200",
        "x": "0.1235",
        "y": "True",
    }


def test_smooth_is_a_centred_mean_of_finite_values():
    values = np.arange(100.0)
    np.testing.assert_allclose(smooth(values, share=50)[2:-2], values[2:-2], rtol=1e-14)
    values[[10, 11]] = np.nan, np.inf
    found = smooth(values, share=50)
    assert found[10] == np.mean([8, 9, 12])
    assert found[0] == np.mean([0, 1, 2])
    assert np.isnan(smooth(np.array([np.nan]))[0])


def test_loss_figure_holds_the_curves():
    train = Curve(STEPS, 3 + 50 / STEPS)
    validation = Curve(STEPS[::5], np.full(4, 3.5))
    (axes,) = loss_figure(train, validation, {"bigram": 4.0, "3-gram": 3.99}).axes
    raw, smoothed, held_out, *lines = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), train.values)
    np.testing.assert_array_equal(smoothed.get_ydata(), smooth(train.values))
    np.testing.assert_array_equal(held_out.get_ydata(), validation.values)
    assert [line.get_ydata()[0] for line in lines] == [4.0, 3.99]
    low, high = axes.get_ylim()
    assert low < 3.25
    assert high > 4.0
    lower, upper = (text.xy[1] for text in axes.texts)
    assert [text.get_text() for text in axes.texts] == ["3-gram 3.990", "bigram 4.000"]
    assert upper - lower > 0.02  # close lines, readable names


def test_loss_figure_survives_a_diverged_run():
    train = Curve(STEPS, np.where(STEPS > 100, np.nan, 5.0))
    (axes,) = loss_figure(train, Curve(STEPS[-1:], np.array([np.nan]))).axes
    assert np.isfinite(axes.get_ylim()).all()


def test_expert_figure_shows_relative_loads():
    loads = np.zeros((2, 3, 4))
    loads[0], loads[1] = 5.0, [[1, 2, 3, 2], [8, 0, 0, 0], [4, 4, 4, 4]]
    heat, line, *_ = expert_figure(loads[1], np.array([10, 20]), loads).axes
    expected = [[0.5, 1, 1.5, 1], [4, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_allclose(heat.images[0].get_array(), expected)
    assert [text.get_text() for text in heat.texts][:4] == ["0.50", "1.00", "1.50", "1.00"]
    busiest = [curve.get_ydata().tolist() for curve in line.lines[:3]]
    assert busiest == [[1, 1.5], [1, 4], [1, 1]]


def test_gate_figure_colours_every_token_by_its_gate():
    tokens = ["a", " b$", "\n  c", "日", ""]
    gates = np.array([[0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 0.5, np.nan, 0.5, 0.0]])
    axes = gate_figure(tokens, gates, ["1", "3"]).axes[0]
    texts = [text.get_text() for text in axes.texts]
    pieces = ["a", " b$", "↵", "  c", "□", "∅"]
    assert texts == ["Engram at layer 1", *pieces, "Engram at layer 3", *pieces]
    assert len(axes.patches) == 12
    red_to_green = [patch.get_facecolor()[1] for patch in axes.patches[:6]]
    assert red_to_green[0] == 1.0  # white at the lowest gate
    assert red_to_green[2] == red_to_green[3]  # a token broken over two lines keeps its colour
    assert all(a > b for a, b in itertools.pairwise(red_to_green[3:]))
    corners = [patch.get_xy() for patch in axes.patches[:6]]
    assert [corner[0] for corner in corners] == [0, 1, 4, 0, 3, 4]
    assert corners[3][1] == corners[0][1] + 1
    assert corners[4][1] == corners[3][1]


def test_gate_figure_breaks_full_lines():
    axes = gate_figure(["abcd", "efgh", "i" * 12], np.zeros((1, 3)), ["1"], columns=6).axes[0]
    pieces = [text.get_text() for text in axes.texts[1:]]
    assert pieces == ["abcd", "efgh", "ii", "iiiiii", "iiii"]
    assert [patch.get_xy()[0] for patch in axes.patches] == [0, 0, 4, 0, 0]
