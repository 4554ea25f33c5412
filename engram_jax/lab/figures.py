"""The plots of an experiment, as PNG and SVG, with matplotlib's Agg canvas (no pyplot)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engram_jax.hardware.storage import replacing
from engram_jax.lab.statistics import Interval, Line
from engram_jax.report.figures import COLOURS, FAINT, INK, QUIET

_DPI = 144


@dataclass(frozen=True)
class Series:
    """A line of a plot: x, y and the paired interval of y's difference to the baseline, all [n].

    fitted: over log10 of x, or None.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[Interval]
    fitted: Line | None = None


def over_axis(
    series: Sequence[Series], label: str, *, log: bool, baseline: tuple[str, float] | None
) -> Figure:
    """Loss over the axis. baseline: name and loss of one that is not on the axis itself."""
    figure = Figure(figsize=(7.2, 4.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, one in zip(_colours(len(series)), series, strict=True):
        order = np.argsort(one.x)
        x, y = np.asarray(one.x)[order], np.asarray(one.y)[order]
        errors = np.array([_halves(one.intervals[i]) for i in order]).T
        title = one.name
        if one.fitted is not None:
            title += f" ({one.fitted.slope:+.4f} per factor 10, R² {one.fitted.r2:.3f})"
            line = one.fitted.intercept + one.fitted.slope * np.log10(x)
            axes.plot(x, line, color=colour, linewidth=1, linestyle=":")
        style = "none" if one.fitted is not None else "-"
        axes.errorbar(
            x, y, errors, color=colour, marker="o", ms=4, capsize=3, ls=style, label=title
        )
    if baseline is not None:
        axes.axhline(baseline[1], color=QUIET, linewidth=1, linestyle="--", label=baseline[0])
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(label, color=QUIET, fontsize=9)
    axes.set_ylabel("held-out loss (nats per token)", color=QUIET, fontsize=9)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    _style(axes)
    return figure


def differences(names: Sequence[str], intervals: Sequence[Interval], baseline: str) -> Figure:
    """Differences to the baseline, one line for each point, the first on top."""
    figure = Figure(figsize=(7.2, 1.2 + 0.3 * len(names)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    means = [interval.mean for interval in intervals]
    errors = np.array([_halves(interval) for interval in intervals]).reshape(-1, 2).T
    at = np.arange(len(names))
    axes.errorbar(
        means, at, xerr=errors, color=COLOURS[0], marker="o", markersize=4, capsize=3, ls="none"
    )
    axes.axvline(0, color=QUIET, linewidth=1)
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out loss minus that of {baseline} (nats)", color=QUIET, fontsize=9)
    _style(axes)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write PATH.png and PATH.svg; the same figure gives the same bytes."""
    with replacing(path.with_suffix(".png"), shared=False) as file:
        figure.savefig(file, format="png")
    with rc_context({"svg.hashsalt": path.name}):
        with replacing(path.with_suffix(".svg"), shared=False) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def _halves(interval: Interval) -> tuple[float, float]:
    """Lengths of the two error bars; none where there is no interval."""
    if math.isnan(interval.low):
        return 0.0, 0.0
    return interval.mean - interval.low, interval.high - interval.mean


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _style(axes) -> None:  # type: ignore[no-untyped-def]
    axes.tick_params(which="both", colors=QUIET, labelsize=8.5, length=0)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
