"""The report's pictures: what is drawn, and that it can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engram_jax.report.figures import (
    Curve,
    expert_figure,
    gate_figure,
    loss_figure,
    memory_figure,
    optimisation_figure,
    smooth,
)

STEPS = np.arange(10, 210, 10)
COUNTS = {"bigram": 4.0, "Kneser-Ney 3-gram counts": 3.99, "unigram": 6.4}


def assert_readable(figure) -> None:
    """No text is cut at the edge, and no label lies on the axes (its curves) or on another."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    labels = []
    for axes in figure.axes:
        inside = axes.get_window_extent()
        for text in axes.texts:
            if text.get_text() and getattr(text, "anncoords", None) == "offset points":
                box = text.get_window_extent()
                assert box.x0 >= inside.x1, text.get_text()
                labels.append(box)
        for text in [*axes.texts, axes.title, *ticks(axes.xaxis), *ticks(axes.yaxis)]:
            if not text.get_text():
                continue
            box = text.get_window_extent()
            assert box.x0 > -1 and box.y0 > -1, text.get_text()
            assert box.x1 < width + 1 and box.y1 < height + 1, text.get_text()
        for axis in (axes.xaxis, axes.yaxis):
            assert not axis.get_offset_text().get_text()  # "+9.9963e-1" above an axis
    for a, b in itertools.combinations(labels, 2):
        assert not a.overlaps(b)


def ticks(axis) -> list:
    """The labels of the ticks that are shown."""
    low, high = sorted(axis.get_view_interval())
    labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label for at, label in labels if low <= at <= high]


def points(axes) -> list[int]:
    """How many points of each line are drawn as points."""
    return [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]


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
    figure = loss_figure(train, validation, COUNTS)
    (axes,) = figure.axes
    raw, smoothed, held_out, *lines = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), train.values)
    np.testing.assert_array_equal(smoothed.get_ydata(), smooth(train.values))
    np.testing.assert_array_equal(held_out.get_ydata(), validation.values)
    assert [line.get_ydata()[0] for line in lines] == list(COUNTS.values())
    low, high = axes.get_ylim()
    assert low < 3.25
    assert high > 6.4
    names = ["training 3.250", "validation 3.500", "Kneser-Ney 3-gram counts 3.990"]
    names += ["bigram 4.000", "unigram 6.400"]
    assert [text.get_text() for text in axes.texts] == names  # from the bottom up
    assert_readable(figure)


def test_labels_of_equal_ends_do_not_leave_the_picture():
    ends = {f"count model {i}": 3.5 for i in range(6)}
    assert_readable(loss_figure(Curve(STEPS, 3.5 - 1 / STEPS), None, ends))


def test_one_point_is_a_point():
    one = Curve(np.array([1]), np.array([5.0]))
    figures = [
        loss_figure(one, one, COUNTS),
        optimisation_figure(one, {"all": one}, 1.0),
        memory_figure({"Hit rate": {"layer 1": one}, "Gate": {"layer 1": one, "layer 3": one}}),
        expert_figure({"1": Curve(one.steps, np.array([[1.0, 2.0]]))}),
    ]
    for figure in figures:
        for axes in figure.axes:
            drawn = [line for line in axes.lines if len(line.get_xdata()) == 1]
            assert points(axes) == [1] * len(drawn)
        assert_readable(figure)
    assert sum(len(points(axes)) for figure in figures for axes in figure.axes) == 9


def test_loss_figure_survives_a_diverged_run():
    train = Curve(STEPS, np.where(STEPS > 100, np.nan, 5.0))
    figure = loss_figure(train, Curve(STEPS[-1:], np.array([np.nan])))
    (axes,) = figure.axes
    assert np.isfinite(axes.get_ylim()).all()
    assert [text.get_text() for text in axes.texts] == ["training 5.000"]
    assert_readable(figure)


def test_optimisation_figure():
    norms = {
        "all": Curve(STEPS, 50 / STEPS),
        "memory": Curve(STEPS, np.r_[0.0, np.nan, 1 / STEPS[2:]]),
    }
    figure = optimisation_figure(Curve(STEPS, np.full(20, 3e-5)), norms, 1.0)
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), np.full(20, 3e-5))
    np.testing.assert_array_equal(right.lines[0].get_ydata(), 50 / STEPS)
    assert np.isnan(right.lines[1].get_ydata()[:2]).all()  # no logarithm
    assert right.get_yscale() == "log"
    assert [text.get_text() for text in right.texts] == ["memory", "all", "clip 1"]
    assert_readable(figure)
    assert {"0", "2e-05"} <= {text.get_text() for text in left.get_yticklabels()}


def test_memory_figure_shows_shares_from_zero():
    """Values that differ in the fifth digit have ticks that can be read."""
    used = {f"layer {n}": Curve(STEPS, 0.9996 + n * 1e-6 * STEPS) for n in (1, 14)}
    figure = memory_figure({"Hit rate": used, "Utilisation": used, "Gate": used})
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0
        assert 1 < axes.get_ylim()[1] < 1.1
    assert_readable(figure)
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert "100%" in ticks and "0%" in ticks


def test_expert_figure_shows_relative_loads_by_the_models_layers():
    loads = np.zeros((2, 3, 4))
    loads[0], loads[1] = 5.0, [[1, 2, 3, 2], [8, 0, 0, 0], [4, 4, 4, 4]]
    steps, layers = np.array([10, 20]), ("3", "4", "7")
    figure = expert_figure({name: Curve(steps, loads[:, i]) for i, name in enumerate(layers)})
    heat, line, *_ = figure.axes
    expected = [[0.5, 1, 1.5, 1], [4, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_allclose(heat.images[0].get_array(), expected)
    assert [text.get_text() for text in heat.texts][:4] == ["0.50", "1.00", "1.50", "1.00"]
    assert [text.get_text() for text in heat.get_yticklabels()] == list(layers)
    busiest = [curve.get_ydata().tolist() for curve in line.lines]
    assert busiest == [[1, 1.5], [1, 4], [1, 1]]
    assert [text.get_text() for text in line.texts] == ["layer 7", "layer 3", "layer 4"]
    assert line.get_ylim()[1] > 4
    assert_readable(figure)


@pytest.mark.parametrize("layers", [12, 60])
def test_expert_figure_of_many_layers(layers):
    rng = np.random.default_rng(0)
    values = rng.dirichlet(np.ones(64), size=(layers, len(STEPS)))
    figure = expert_figure({str(i + 1): Curve(STEPS, x) for i, x in enumerate(values)})
    heat, line, *_ = figure.axes
    assert heat.images[0].get_array().shape == (layers, 64)
    ticks = [int(text.get_text()) for text in heat.get_yticklabels()]
    assert ticks[0] == 1 and len(ticks) <= 32
    ends = {f"layer {i + 1}": curve.get_ydata()[-1] for i, curve in enumerate(line.lines)}
    shown = [text.get_text() for text in line.texts]
    assert shown == [min(ends, key=ends.get), max(ends, key=ends.get)]
    assert_readable(figure)


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
