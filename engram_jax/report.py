"""The report at the end of a run: report.md with its pictures, and the same as one report.html.

Everything is read from metrics.jsonl or given as plain values, so a report can be written again.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.metrics import read_metrics
from engram_jax.report_figures import (
    Curve,
    expert_figure,
    gate_figure,
    loss_figure,
    memory_figure,
)

_FOLDER = "report"


@dataclass(frozen=True)
class GateSample:
    """Gates on a piece of text.

    tokens: T pieces of text. gates: float [L, T], one row per Engram layer, mean over the branches.
    layers: names of the L layers.
    """

    tokens: Sequence[str]
    gates: np.ndarray
    layers: Sequence[object]


@dataclass(frozen=True)
class _Section:
    """A part of the report: a picture with its caption, a table, or a text."""

    title: str
    caption: str = ""
    picture: Path | None = None
    rows: tuple[tuple[str, str], ...] = ()
    texts: tuple[tuple[str, str], ...] = ()


def write_report(
    workdir: str | Path,
    *,
    title: str,
    figures: Mapping[str, object] | None = None,
    baselines: Mapping[str, float] | None = None,
    gates: GateSample | None = None,
    samples: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `workdir`/report.html, report.md and report/*.png; returns the path of the first.

    figures: further key figures by name, shown as they are (floats in 4 digits).
    baselines: losses in nats per token by name, such as {"bigram": 4.1}.
    samples: (prompt, continuation) pairs.

    Read from metrics.jsonl, where present: loss, validation_loss, tokens_per_second, step_seconds,
    expert_load [MoE layers, E], and by layer hit_rate/, utilisation/ and gate/.
    """
    root = Path(workdir)
    (root / _FOLDER).mkdir(parents=True, exist_ok=True)
    records = read_metrics(root)
    sections = [_Section("Key figures", rows=key_figures(records, figures or {}, baselines or {}))]

    def draw(name: str, title: str, caption: str, figure: Any) -> None:
        path = root / _FOLDER / f"{name}.png"
        figure.savefig(path)
        sections.append(_Section(title, caption, path))

    train, validation = curve(records, "loss"), curve(records, "validation_loss")
    if len(train.steps):
        figure = loss_figure(train, validation, baselines)
        draw("loss", "Loss", "Dashed: count models fitted on the same training tokens.", figure)
    panels = _memory_panels(records)
    if panels:
        caption = (
            "Hit rate: share of the rows a batch touches that earlier batches have trained."
            " Utilisation: share of a table's rows that any batch has touched."
        )
        draw("memory", "Memory", caption, memory_figure(panels))
    if gates is not None and len(gates.tokens):
        caption = (
            "How far the context lets the memory's value through at each token (mean over the"
            " residual streams). The memory of a token is looked up by the n-gram that ends there."
        )
        figure = gate_figure(gates.tokens, np.asarray(gates.gates, np.float64), gates.layers)
        draw("gates", "Gates on held-out text", caption, figure)
    load = curve(records, "expert_load")
    if len(load.steps):
        last = load.values[-max(1, len(load.steps) // 10) :].mean(axis=0)
        caption = "Left: mean over the last tenth of the run. Thin lines: one MoE layer each."
        figure = expert_figure(last, load.steps, load.values)
        draw("experts", "Expert load", caption, figure)
    if samples:
        sections.append(_Section("Samples", texts=tuple(samples)))
    (root / "report.md").write_text(_markdown(title, sections, root), encoding="utf-8")
    (root / "report.html").write_text(_html(title, sections), encoding="utf-8")
    return root / "report.html"


def curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """A metric over its steps; of two records of a step, the later one."""
    found = {record["step"]: record[name] for record in records if name in record}
    steps = sorted(found)
    return Curve(np.array(steps, np.int64), np.array([found[s] for s in steps], np.float64))


def key_figures(
    records: Sequence[Mapping[str, Any]],
    figures: Mapping[str, object],
    baselines: Mapping[str, float],
) -> tuple[tuple[str, str], ...]:
    """(name, value) pairs for the table."""
    rows: list[tuple[str, str]] = []
    validation, train = curve(records, "validation_loss"), curve(records, "loss")
    if len(validation.steps):
        final = float(validation.values[-1])
        rows.append(("validation loss at the end", f"{final:.4f} nats per token"))
        if np.isfinite(validation.values).any():
            best = int(np.nanargmin(validation.values))
            at = f"{validation.values[best]:.4f} at step {validation.steps[best]:,}"
            rows.append(("lowest validation loss", at))
        for name, value in baselines.items():
            side = "below" if final <= value else "above"
            gap = f"the model is {abs(value - final):.4f} {side}"
            rows.append((f"{name} on the same tokens", f"{value:.4f}; {gap}"))
    if len(train.steps):
        last = train.values[-10:]
        rows.append(("training loss, last records", f"{float(last.mean()):.4f}"))
        rows.append(("steps", f"{int(train.steps[-1]):,}"))
    for name, label in (("tokens_per_second", "tokens per second"), ("step_seconds", "step")):
        values = curve(records, name).values
        if len(values):
            middle = float(np.median(values))
            rows.append((label, f"{middle:,.0f}" if name[0] == "t" else f"{middle:.4g} s"))
    rows.extend((name, _shown(value)) for name, value in figures.items())
    return tuple(rows)


def _memory_panels(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Hit rate, utilisation and mean gate by Engram layer, as far as they were logged."""
    panels: dict[str, dict[str, Curve]] = {}
    names = sorted({name for record in records for name in record})
    titles = {"hit_rate": "Hit rate", "utilisation": "Utilisation", "gate": "Mean gate"}
    for prefix, title in titles.items():
        for name in names:
            if name.startswith(f"{prefix}/"):
                found = curve(records, name)
                values = found.values.reshape(len(found.steps), -1).mean(axis=1)
                layer = name.split("/", 1)[1]
                panels.setdefault(title, {})[f"layer {layer}"] = Curve(found.steps, values)
    return panels


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _markdown(title: str, sections: Sequence[_Section], root: Path) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.rows:
            lines = ["| | |", "| --- | --- |"]
            lines += [f"| {cell(name)} | {cell(value)} |" for name, value in section.rows]
            parts.append("\n".join(lines))
        if section.picture is not None:
            parts.append(f"![{section.title}]({section.picture.relative_to(root).as_posix()})")
        if section.caption:
            parts.append(section.caption)
        for prompt, text in section.texts:
            indented = "\n".join("    " + line for line in (prompt + text).splitlines())
            parts.append(f"Prompt `{cell(prompt)}`:\n\n{indented}")
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.5rem; color: #22272e;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: .4rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
img { max-width: 100%; height: auto } figure { margin: 0 }
figcaption { color: #6b7480; font-size: .88rem; margin-top: .3rem }
table { border-collapse: collapse }
td { padding: .3rem 2rem .3rem 0; border-top: 1px solid #e4e8ec }
td + td { font-variant-numeric: tabular-nums } td:first-child { color: #6b7480 }
pre { background: #f6f8fa; border-radius: 6px; padding: .9rem 1.1rem; font-size: .86rem;
      white-space: pre-wrap; overflow-wrap: anywhere } pre b { color: #2166ac }
"""


def _html(title: str, sections: Sequence[_Section]) -> str:
    text = html.escape
    parts = [f"<h1>{text(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{text(section.title)}</h2>")
        if section.rows:
            rows = (f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in section.rows)
            parts.append(f"<table>{''.join(rows)}</table>")
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            image = f'<img alt="{text(section.title)}" src="data:image/png;base64,{data}">'
            caption = f"<figcaption>{text(section.caption)}</figcaption>" if section.caption else ""
            parts.append(f"<figure>{image}{caption}</figure>")
        for prompt, continuation in section.texts:
            parts.append(f"<pre><b>{text(prompt)}</b>{text(continuation)}</pre>")
    head = f"<meta charset='utf-8'><title>{text(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{body}</body></html>\n"
