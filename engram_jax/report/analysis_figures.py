"""The pictures of an analysis (--mode=analyse), drawn from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from engram_jax.report.figures import COLOURS, INK, QUIET, canvas, style

Record = Mapping[str, Any]


def lens_figure(record: Record) -> Figure:
    """KL by layer on a logarithmic scale, a line for each model with twice its standard error."""
    figure, (axes,) = canvas(8.6, 3.8)
    style(axes, "", "layer", "KL to the last layer, nats per token")
    for colour, model in zip(COLOURS, record["models"], strict=False):
        kl = np.asarray(model["kl"][:-1], np.float64)  # the last is 0
        error = 2 * np.nan_to_num(np.asarray(model["standard_error"][:-1], np.float64))
        layers = np.arange(len(kl))
        label = f"{model['name']} ({model['run']})"
        axes.plot(layers, kl, color=colour, marker="o", markersize=3.5, label=label)
        axes.fill_between(
            layers, np.maximum(kl - error, 1e-12), kl + error, color=colour, alpha=0.2
        )
        memory = [layer for layer in model["engram_layers"] if layer < len(kl)]
        axes.plot(memory, kl[memory], "D", color=colour, markersize=7, fillstyle="none")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    return figure


def cka_figure(record: Record) -> Figure:
    """The heat map, first model upwards, and where each layer of the second is aligned."""
    values = np.asarray(record["cka"], np.float64)
    rows, columns = values.shape
    figure, (axes,) = canvas(min(9, 2.6 + 0.55 * columns), min(9, 1.8 + 0.5 * rows))
    image = axes.imshow(values, origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
    style(axes, "", f"layer of {record['second']}", f"layer of {record['first']}")
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    if max(rows, columns) <= 16:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 0.6 else INK
            shown = f"{value:.2f}"
            axes.text(column, row, shown, ha="center", va="center", fontsize=7.5, color=colour)
    if record["soft_alignment"] is not None:
        aligned = np.asarray(record["soft_alignment"], np.float64)
        axes.plot(np.arange(columns), aligned, color="#d7301f", marker="o", markersize=4)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=0)
    return figure


def sensitivity_figure(parts: Sequence[Record]) -> Figure:
    """Nats per token that the loss rises by, a bar for each part, the first on top."""
    figure, (axes,) = canvas(8.6, 0.9 + 0.19 * len(parts))
    at = np.arange(len(parts))
    style(axes, "", "held-out loss rises by, nats per token")
    axes.barh(at, [part["rise"] for part in parts], color=COLOURS[0], height=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_yticks(at, [part["part"] for part in parts])
    axes.invert_yaxis()
    axes.axvline(0, color=QUIET, linewidth=0.8)
    return figure


def usage_figure(of_layer: Record, bands: Sequence[str]) -> Figure:
    """Of one layer, by order: how often rows are read by rank, which share of the rows is read how
    often, and the mean norm of rows that are read so often."""
    figure, (left, middle, right) = canvas(9.6, 3.4, columns=3)
    style(left, "Hits per row", "rank", "lookups")
    for axes, title in ((middle, "Rows by hits"), (right, "Mean norm by hits")):
        style(axes, title, "")
        axes.set_xticks(range(len(bands)), [_short(band) for band in bands])
        axes.tick_params(axis="x", labelrotation=60)
    width = 0.8 / max(1, len(of_layer))
    for i, (order, used) in enumerate(of_layer.items()):
        colour, label = COLOURS[i % len(COLOURS)], f"{order}-grams"
        ranks, hits = (np.asarray(x, np.float64) for x in used["hits_curve"])
        left.plot(ranks[hits > 0], hits[hits > 0], color=colour, label=label)
        total = sum(used["rows_by_band"]) or 1
        shares = [count / total for count in used["rows_by_band"]]
        middle.bar(np.arange(len(bands)) + i * width - 0.4 + width / 2, shares, width, color=colour)
        norms = [np.nan if x is None else x for x in used["mean_norm_by_band"]]
        right.plot(np.arange(len(bands)), norms, color=colour, marker="o", markersize=3.5)
    left.set_xscale("log")
    left.set_yscale("log")
    left.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    right.set_ylim(bottom=0)
    return figure


def frequency_figure(losses: Sequence[Record]) -> Figure:
    """Loss by how often the n-gram was in training, memory on and off; a panel by order."""
    orders = list(dict.fromkeys(loss["order"] for loss in losses))
    figure, panels = canvas(8.6, 3.2, columns=max(1, len(orders)))
    for axes, order in zip(panels, orders, strict=True):
        own = [loss for loss in losses if loss["order"] == order]
        style(axes, f"{order}-grams", "", "nats per token" if axes is panels[0] else "")
        _pair(axes, own)
    panels[0].legend(fontsize=8.5, frameon=False, labelcolor=INK)
    return figure


def _pair(axes: Axes, losses: Sequence[Record]) -> None:
    at = np.arange(len(losses))
    for colour, key, label in ((COLOURS[0], "loss", "memory on"), (QUIET, "loss_off", "off")):
        values = [np.nan if loss[key] is None else loss[key] for loss in losses]
        axes.plot(at, values, color=colour, marker="o", markersize=3.5, label=label)
    axes.set_xticks(at, [_short(loss["band"]) for loss in losses])
    axes.tick_params(axis="x", labelrotation=60)


def _short(band: str) -> str:
    """ "never", "once", "2 to 3 times", "256 times and more" as a tick."""
    words = {"never": "0", "once": "1"}
    return words.get(band) or band.replace(" to ", "-").replace(" times", "").replace(
        " and more", "+"
    )
