"""The pictures of a report, drawn from plain arrays with matplotlib's Agg canvas (no pyplot)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

INK, QUIET, FAINT = "#22272e", "#6b7480", "#d9dee4"
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#b8860b", "#35978f")
_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#fdd49e", "#fc8d59", "#d7301f"])
_BALANCE = LinearSegmentedColormap.from_list("balance", ["#2166ac", "#f7f7f7", "#d6604d"])
_MONO = "DejaVu Sans Mono"  # comes with matplotlib
_CELL, _LINE = 0.088, 0.24  # inches: width of a monospaced character, height of a line of text


@dataclass(frozen=True)
class Curve:
    """A metric over training: steps and values, both [n]."""

    steps: np.ndarray
    values: np.ndarray


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _style(axes: Axes, title: str, xlabel: str = "step", ylabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, color=QUIET, fontsize=9)
    axes.set_ylabel(ylabel, color=QUIET, fontsize=9)
    axes.tick_params(colors=QUIET, labelsize=8.5, length=0)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


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
    """Loss in nats per token. baselines: horizontal lines by name."""
    baselines = baselines or {}
    figure, (axes,) = _figure(8.6, 4.4)
    _style(axes, "Loss", ylabel="nats per token")
    smoothed = smooth(train.values)
    axes.plot(train.steps, train.values, color=COLOURS[0], alpha=0.22, linewidth=0.9)
    axes.plot(train.steps, smoothed, color=COLOURS[0], linewidth=1.8, label="training (smoothed)")
    ends = [smoothed[np.isfinite(smoothed)][-1:]]
    if validation is not None and len(validation.steps):
        label = f"validation, last {validation.values[-1]:.3f}"
        axes.plot(
            validation.steps,
            validation.values,
            color=COLOURS[1],
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            label=label,
        )
        ends.append(validation.values[np.isfinite(validation.values)])
    for value in baselines.values():
        axes.axhline(value, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    # The first steps fall from log V: start the axis where the curve has left them behind.
    after = smoothed[min(len(smoothed) - 1, max(1, len(smoothed) // 20)) :]
    shown = np.concatenate([after[np.isfinite(after)], *ends, list(baselines.values())])
    if len(shown):
        low, high = float(shown.min()), float(shown.max())
        margin = 0.06 * max(high - low, 0.1)
        axes.set_ylim(low - margin, high + 2 * margin)
        _label_lines(axes, baselines, gap=margin)
    axes.margins(x=0.01)
    axes.legend(
        loc="upper center",
        fontsize=9,
        labelcolor=INK,
        framealpha=1,
        edgecolor="white",
        borderpad=0.2,
    )
    return figure


def _label_lines(axes: Axes, lines: Mapping[str, float], gap: float) -> None:
    """Name horizontal lines at the right, from the bottom up and at least `gap` apart."""
    place = -np.inf
    for name, value in sorted(lines.items(), key=lambda item: item[1]):
        place = max(value, place + gap)
        axes.annotate(
            f"{name} {value:.3f}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=QUIET,
        )


def memory_figure(panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Numbers between 0 and 1 over training: a panel by title, in it a curve by name."""
    figure, all_axes = _figure(8.6, 2.9, columns=len(panels))
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        _style(axes, title)
        for i, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(curve.steps, curve.values, color=colour, linewidth=1.5, label=name)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def expert_figure(load: np.ndarray, steps: np.ndarray, loads: np.ndarray) -> Figure:
    """Load of the routed experts: where it ended, and how even it was on the way.

    load: [L, E] assignments or shares of each MoE layer. loads: [n, L, E] likewise, at steps [n].
    """
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-30)
    layers, experts = relative.shape
    figure = Figure(figsize=(8.6, max(2.4, 1.3 + 0.28 * layers)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    heat, line = figure.subplots(1, 2, width_ratios=(2, 1))
    spread = max(0.25, float(np.abs(relative - 1).max()))
    norm = TwoSlopeNorm(1, vmin=max(0.0, 1 - spread), vmax=1 + spread)
    image = heat.imshow(relative, cmap=_BALANCE, norm=norm, aspect="auto")
    _style(heat, "Expert load at the end (1 = even)", "expert", "MoE layer")
    heat.grid(False)
    heat.spines["bottom"].set_visible(False)
    if layers <= 32:
        heat.set_yticks(range(layers))
    if experts <= 16:
        heat.set_xticks(range(experts))
    if experts <= 16 and layers <= 32:
        for (row, column), value in np.ndenumerate(relative):
            dark = abs(value - 1) > 0.65 * spread
            heat.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else INK,
            )
    bar = figure.colorbar(image, ax=heat, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=0)
    busiest = loads.max(axis=2) / np.maximum(loads.mean(axis=2), 1e-30)
    _style(line, "Busiest expert over even share")
    for layer in range(layers):
        line.plot(steps, busiest[:, layer], color=COLOURS[0], alpha=0.35, linewidth=0.9)
    line.plot(
        steps, smooth(busiest.max(axis=1)), color=COLOURS[1], linewidth=1.8, label="worst layer"
    )
    line.set_ylim(bottom=1)
    line.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def gate_figure(
    tokens: Sequence[str], gates: np.ndarray, layers: Sequence[object], columns: int = 92
) -> Figure:
    """Text with every token on a background as strong as its gate.

    tokens: T pieces of text. gates: [L, T] in [0, 1], mean over the branches. layers: L names.
    columns: characters per line at most.
    """
    pieces = _typeset(tokens, columns)
    lines = 1 + max((piece.line for piece in pieces), default=0)
    columns = max([30, *(piece.column + len(piece.text) for piece in pieces)])
    block = lines + 1.7  # with its heading and the space below
    width, height = columns * _CELL, (len(layers) * block - 0.5) * _LINE
    full_width, full_height = width + 1.0, height + 0.2
    figure = Figure(figsize=(full_width, full_height), dpi=144)
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
