"""The pictures of a report, drawn from plain arrays with matplotlib's Agg canvas (no pyplot).

Needs the extra `report`; `write.py` does without where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from engram_jax.report.tables import Curve

INK, QUIET, FAINT = "#22272e", "#6b7480", "#d9dee4"
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#b8860b", "#35978f")
_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#fdd49e", "#fc8d59", "#d7301f"])
_BALANCE = LinearSegmentedColormap.from_list("balance", ["#2166ac", "#f7f7f7", "#d6604d"])
_MONO = "DejaVu Sans Mono"  # comes with matplotlib
_DPI = 144
_FEW = 12  # a curve of at most so many points shows them
_CELL, _LINE = 0.088, 0.24  # inches: width of a monospaced character, height of a line of text


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches, and its axes side by side."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def style(axes: Axes, title: str, xlabel: str = "step", ylabel: str = "") -> None:
    """Axes as all pictures have them."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, color=QUIET, fontsize=9)
    axes.set_ylabel(ylabel, color=QUIET, fontsize=9)
    axes.tick_params(which="both", colors=QUIET, labelsize=8.5, length=0)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def _plot(axes: Axes, curve: Curve, colour: str, width: float = 1.6, **options: Any) -> Line2D:
    """A line through the finite values, with markers where they are few: one point is no line."""
    marker = "o" if np.isfinite(curve.values).sum() <= _FEW else ""
    if len(curve.steps):
        axes.set_xlim(0, max(axes.get_xlim()[1], 1.02 * float(curve.steps[-1])))
    (line,) = axes.plot(
        curve.steps,
        curve.values,
        color=colour,
        linewidth=width,
        marker=marker,
        markersize=3.5,
        **options,
    )
    return line


def _label_ends(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Name lines to the right of the axes, at the height of their ends and no two over each other.

    labels: (text, value at the end, colour). The limits of the axes must be final.
    """
    inches = axes.bbox.height / _DPI
    axes.get_ylim()  # scales what is not scaled yet
    labels = sorted(labels, key=lambda label: label[1])
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(np.clip(to_axes.transform((1, value))[1], 0, 1)) for _, value, _ in labels]
    gap = 0.16 / inches
    for i in range(1, len(heights)):  # up, where two are too close, then down from the top
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for (text, _, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )


def _end(name: str, curve: Curve, colour: str) -> list[tuple[str, float, str]]:
    """The label of a curve for `_label_ends`; none if no value is finite."""
    finite = curve.values[np.isfinite(curve.values)]
    return [(name, float(finite[-1]), colour)] if len(finite) else []


def _plain(value: float, _: object = None) -> str:
    """A tick's label: no offset, no power of ten set apart."""
    return f"{value:.4g}"


def smooth(values: np.ndarray, share: int = 40) -> np.ndarray:
    """Centred moving mean over n / `share` values on either side; only finite ones count."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (len(values) // share) + 1)
    kept = np.convolve(finite, kernel, "full")
    total = np.convolve(np.where(finite, values, 0), kernel, "full")
    half = len(kernel) // 2
    with np.errstate(invalid="ignore"):
        return (total / kept)[half : half + len(values)]


def loss_figure(
    train: Curve, validation: Curve | None = None, baselines: Mapping[str, float] | None = None
) -> Figure:
    """Loss in nats per token. baselines: horizontal lines by name, of the validation's tokens."""
    baselines = baselines or {}
    figure, (axes,) = canvas(8.6, 4.4)
    style(axes, "", ylabel="nats per token")
    smoothed = Curve(train.steps, smooth(train.values))
    _plot(axes, train, COLOURS[0], 0.9, alpha=0.22)
    _plot(axes, smoothed, COLOURS[0], 1.8)
    curves = [("training", smoothed, COLOURS[0])]
    if validation is not None and len(validation.steps):
        _plot(axes, validation, COLOURS[1])
        curves.append(("validation", validation, COLOURS[1]))
    for value in baselines.values():
        axes.axhline(value, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    labels = [(f"{name} {value:.3f}", value, QUIET) for name, value in baselines.items()]
    for name, curve, colour in curves:
        labels += [(f"{name} {value:.3f}", value, c) for _, value, c in _end(name, curve, colour)]
    # The first steps fall from log V: start the axis where the curve has left them behind.
    after = smoothed.values[min(len(train.steps) - 1, max(1, len(train.steps) // 20)) :]
    shown = np.array([*after[np.isfinite(after)], *(value for _, value, _ in labels)])
    if len(shown):
        margin = 0.06 * max(float(np.ptp(shown)), 0.1)
        axes.set_ylim(float(shown.min()) - margin, float(shown.max()) + 2 * margin)
    _label_ends(axes, labels)
    return figure


def optimisation_figure(rate: Curve, norms: Mapping[str, Curve], clip: float | None) -> Figure:
    """Learning rate; gradient norms by name on a logarithmic scale, clipped at `clip`."""
    figure, (left, right) = canvas(8.6, 2.9, columns=2)
    style(left, "Learning rate")
    _plot(left, rate, COLOURS[0])
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(_plain)
    style(right, "Gradient norm")
    labels = []
    for colour, (name, curve) in zip(COLOURS, norms.items(), strict=False):
        positive = np.isfinite(curve.values) & (curve.values > 0)
        shown = Curve(curve.steps, np.where(positive, curve.values, np.nan))
        _plot(right, shown, colour, 1.2)
        labels += _end(name, shown, colour)
    if labels:
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        right.yaxis.set_major_formatter(_plain)
        right.yaxis.set_minor_formatter(NullFormatter())
        if clip:
            right.axhline(clip, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            labels.append((f"clip {clip:g}", clip, QUIET))
    _label_ends(right, labels)
    return figure


def memory_figure(panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Shares (numbers in [0, 1]) over training: a panel by title, in it a curve by name."""
    figure, all_axes = canvas(8.6, 2.9, columns=len(panels))
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        style(axes, title)
        labels, widths = [], np.linspace(2.6 if len(curves) > 1 else 1.6, 1.2, len(curves))
        for i, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            _plot(axes, curve, colour, widths[i])
            labels += _end(name, curve, colour)
        top = max((np.nanmax(c.values, initial=0) for c in curves.values()), default=0.0)
        axes.set_ylim(0, 1.06 * top if np.isfinite(top) and top > 0 else 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(curves) <= len(COLOURS):
            _label_ends(axes, labels if len(curves) > 1 else [])
    return figure


def expert_figure(loads: Mapping[str, Curve]) -> Figure:
    """Load of the routed experts: where it ended, and how even it was on the way.

    loads: by layer id assignments or shares of its experts, values [n, E].
    """
    ends = [c.values[-max(1, len(c.steps) // 10) :].mean(axis=0) for c in loads.values()]
    relative = np.stack([end / max(end.mean(), 1e-30) for end in ends])
    layers = len(relative)
    height = min(max(2.6, 1.5 + 0.28 * layers), 6.5)
    figure = Figure(figsize=(8.6, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    heat, line = figure.subplots(1, 2, width_ratios=(3, 2))
    _heat_map(figure, heat, relative, list(loads))
    style(line, "Busiest expert, of an even share")
    busiest = {
        layer: Curve(
            c.steps, smooth(c.values.max(axis=1) / np.maximum(c.values.mean(axis=1), 1e-30))
        )
        for layer, c in loads.items()
    }
    few = layers <= len(COLOURS)
    labels = []
    for i, (layer, curve) in enumerate(busiest.items()):
        colour = COLOURS[i] if few else COLOURS[0]
        _plot(line, curve, colour, 1.4 if few else 0.7, alpha=1.0 if few else 0.4)
        labels += _end(f"layer {layer}", curve, colour)
    top = np.nanmax([np.nanmax(c.values, initial=1.0) for c in busiest.values()])
    line.set_ylim(1, 1 + 1.08 * max(float(top) - 1, 0.1))
    line.yaxis.set_major_formatter(_plain)
    # Of many layers, the highest and the lowest at the end.
    labels.sort(key=lambda label: label[1])
    _label_ends(line, labels if few else [*labels[:1], *labels[-1:]])
    return figure


def _heat_map(figure: Figure, axes: Axes, relative: np.ndarray, layers: Sequence[str]) -> None:
    """relative: [L, E], 1 = an even share."""
    spread = max(0.25, float(np.nanmax(np.abs(relative - 1))))
    norm = TwoSlopeNorm(1, vmin=max(0.0, 1 - spread), vmax=1 + spread)
    image = axes.imshow(relative, cmap=_BALANCE, norm=norm, aspect="auto")
    style(axes, "Expert load at the end (1 = even)", "expert", "layer")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    every = -(-len(layers) // 32)
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    experts = relative.shape[1]
    if experts <= 16:
        axes.set_xticks(range(experts))
    if experts <= 16 and len(layers) <= 32:
        for (row, column), value in np.ndenumerate(relative):
            dark = abs(value - 1) > 0.65 * spread
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else INK,
            )
    inches = figure.get_size_inches()[1]
    bar = figure.colorbar(image, ax=axes, shrink=min(0.9, 2.4 / inches), pad=0.02, aspect=16)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=0)


def gate_figure(
    tokens: Sequence[str], gates: np.ndarray, layers: Sequence[object], columns: int = 92
) -> Figure:
    """Text with every token on a background as strong as its gate.

    tokens: T strings. gates: [L, T] in [0, 1], mean over the branches. layers: L names.
    columns: characters per line at most.
    """
    pieces = _typeset(tokens, columns)
    lines = 1 + max((piece.line for piece in pieces), default=0)
    columns = max([30, *(piece.column + len(piece.text) for piece in pieces)])
    block = lines + 1.7  # with its heading and the space below
    width, height = columns * _CELL, (len(layers) * block - 0.5) * _LINE
    full_width, full_height = width + 1.0, height + 0.2
    figure = Figure(figsize=(full_width, full_height), dpi=_DPI)
    FigureCanvasAgg(figure)
    area = (0.1 / full_width, 0.1 / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(area)
    axes.set(xlim=(0, columns), ylim=(height / _LINE, 0))
    axes.axis("off")
    finite = gates[np.isfinite(gates)]
    low = np.floor(10 * finite.min()) / 10 if finite.size else 0.0
    high = np.ceil(10 * finite.max()) / 10 if finite.size else 1.0
    norm = Normalize(low, max(high, low + 0.1))
    for i, (name, row) in enumerate(zip(layers, gates, strict=True)):
        top = i * block
        axes.text(0, top + 0.7, f"Engram at layer {name}", fontsize=10, color=INK, weight="bold")
        for piece in pieces:
            y, strength = top + 1.1 + piece.line, float(norm(row[piece.token]))
            corner = (piece.column, y)
            axes.add_patch(Rectangle(corner, len(piece.text), 0.94, color=_HEAT(strength), lw=0))
            axes.text(
                piece.column,
                y + 0.68,
                piece.text,
                family=_MONO,
                fontsize=_CELL * 72 / 0.602,  # a character of this font is 0.602 em wide
                color="white" if strength > 0.85 else INK,
                parse_math=False,
            )
    bar_height = min(height, 1.6)
    place = (1 - 0.75 / full_width, 0.1 / full_height, 0.14 / full_width, bar_height / full_height)
    bar = figure.colorbar(ScalarMappable(norm, _HEAT), cax=figure.add_axes(place))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=0)
    bar.ax.set_title("gate", fontsize=8.5, color=QUIET, loc="left")
    return figure


@dataclass(frozen=True)
class _Piece:
    """A part of a token on one line of the picture."""

    token: int
    line: int
    column: int
    text: str


def _typeset(tokens: Sequence[str], columns: int) -> list[_Piece]:
    """Break the text at its own line ends and where a line is full."""
    pieces, line, column = [], 0, 0
    for index, token in enumerate(tokens):
        for part in token.replace("\r\n", "\n").splitlines(keepends=True) or [""]:
            text = "".join(_visible(c) for c in part) or "∅"
            while text:
                full = column == columns
                if full or (column + len(text) > columns >= len(text)):
                    line, column = line + 1, 0
                shown, text = text[: columns - column], text[columns - column :]
                pieces.append(_Piece(index, line, column, shown))
                column += len(shown)
            if part.endswith("\n"):
                line, column = line + 1, 0
    return pieces


def _visible(character: str) -> str:
    shown = {"\n": "↵", "\t": "→", "\r": "", " ": " "}.get(character, character)
    return shown if all(_has_glyph(c) for c in shown) else "□"


@cache
def _has_glyph(character: str) -> bool:
    font = FT2Font(font_manager.findfont(_MONO))
    return character.isprintable() and font.get_char_index(ord(character)) != 0
