"""The report at the end of a run: report.md with its pictures, and the same as one report.html.

What it shows stands in the run's own files (metrics.jsonl, losses.json, run.json) or is given as
plain values, so a report can be written again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.checkpoint.run_record import read_launches
from engram_jax.checkpoint.workdir import LOSSES, RUN, TASK_SCORES
from engram_jax.config.extras import lacks
from engram_jax.config.given_files import read_json
from engram_jax.hardware.storage import replacing, write_text
from engram_jax.monitoring.metrics import read_metrics
from engram_jax.report.page import Section, as_html, as_markdown
from engram_jax.report.tables import (
    Curve,
    configuration_section,
    context_section,
    curve,
    data_rows,
    launch_rows,
    loss_section,
    model_rows,
    run_rows,
    subtitle,
    task_section,
)

_FOLDER = "report"


@dataclass(frozen=True)
class GateSample:
    """Gates on a text.

    tokens: T strings. gates: float [L, T], one row per Engram layer, mean over the branches.
    layers: names of the L layers.
    """

    tokens: Sequence[str]
    gates: np.ndarray
    layers: Sequence[object]


def write_report(
    workdir: str | Path,
    *,
    title: str,
    model: Mapping[str, Any] | None = None,
    gates: GateSample | None = None,
    samples: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `workdir`/report.html, report.md and report/*.png; returns the path of the first.

    Without the extra `report` there are no pictures, and the report says why.

    title: the model's name. model: what `describe.describe` says of it. samples: (prompt,
    continuation) pairs.

    Read from `workdir`, where present: losses.json (`finish.loss_record`), task_scores.json
    (`evaluation.tasks`), run.json, and of
    metrics.jsonl: loss, validation_loss, learning_rate, grad_norm, grad_norm_memory,
    tokens_per_second, step_seconds, mfu, goodput, and by layer hit_rate/, utilisation/, gate/ and
    expert_load/.
    """
    root = Path(workdir)
    (root / _FOLDER).mkdir(parents=True, exist_ok=True)
    records = read_metrics(root)
    losses = read_json(root / LOSSES) if (root / LOSSES).exists() else {}
    launches = read_launches(root / RUN) if (root / RUN).exists() else []
    # One that found the run finished made no step of what is shown here.
    launches = [x for x in launches if x["resumed_at"] < losses.get("step", math.inf)] or launches
    launch = launches[-1] if launches else {}
    sections = [loss_section(losses, title)] if losses else []
    if losses and (by_context := context_section(losses)):
        sections.append(by_context)
    if (root / TASK_SCORES).exists():
        sections.append(task_section(read_json(root / TASK_SCORES)))
    if records or losses:
        sections.append(Section("Training", rows=run_rows(records, losses, launch)))
    if missing := lacks("report"):
        sections.append(Section("Pictures", f"None are drawn: {missing}."))
    else:
        sections += _pictures(root, title, records, losses, launch, gates)
    if samples:
        sections.append(Section("Samples", texts=tuple(samples)))
    if model:
        sections.append(Section("Model", rows=model_rows(model)))
    if text := losses.get("data") or launch.get("data"):
        sections.append(Section("Data", rows=data_rows(text)))
    if launches:
        sections.append(Section("Launch", "run.json has all of it.", rows=launch_rows(launches)))
        sections.append(configuration_section(launch["config"]))
    head = title, subtitle(losses, model or {}, launch)
    write_text(root / "report.md", as_markdown(*head, sections, root))
    write_text(root / "report.html", as_html(*head, sections))
    return root / "report.html"


def no_pictures() -> str:
    """A line for the user if the report will have no pictures, else ""."""
    missing = lacks("report")
    return f"the report will have no pictures: {missing}" if missing else ""


def _pictures(
    root: Path,
    title: str,
    records: Sequence[Mapping[str, Any]],
    losses: Mapping[str, Any],
    launch: Mapping[str, Any],
    gates: GateSample | None,
) -> list[Section]:
    """What can be drawn of what was logged."""
    from engram_jax.report import figures

    sections: list[Section] = []

    def draw(name: str, title: str, caption: str, figure: Any) -> None:
        path = root / _FOLDER / f"{name}.png"
        with replacing(path, shared=False) as file:
            figure.savefig(file, format="png")
        sections.append(Section(title, caption, path))

    train, validation = curve(records, "loss"), curve(records, "validation_loss")
    if len(train.steps) or len(validation.steps):
        caption, baselines = "", {}
        if losses:
            of = losses["validation_loss"]
            baselines = {k: float(v) for k, v in of["nats_per_token"].items() if k != title}
            caption = f"Validation: {of['of']}, {of['targets']:,} predicted tokens"
            caption += "; dashed: count models on the same." if baselines else "."
        draw("loss", "Loss", caption, figures.loss_figure(train, validation, baselines))
    rate, norms = curve(records, "learning_rate"), _norms(records)
    if len(rate.steps) and norms:
        clip = launch.get("config", {}).get("optimizer", {}).get("clip_norm")
        caption = "The gradient's norm before clipping, and the memory's part of it (table rows)."
        figure = figures.optimisation_figure(rate, norms, clip)
        draw("optimisation", "Optimisation", caption, figure)
    if panels := _memory_panels(records):
        caption = (
            "Hit rate: share of the rows a batch touches that earlier batches have trained."
            " Utilisation: share of a table's rows that any batch has touched."
            " Gate: mean over a batch's tokens and the residual streams."
        )
        draw("memory", "Memory", caption, figures.memory_figure(panels))
    if gates is not None and len(gates.tokens):
        caption = (
            "How far the context lets the memory's value through at each token (mean over the"
            " residual streams). The memory of a token is looked up by the n-gram that ends there."
        )
        means = np.asarray(gates.gates, np.float64)
        figure = figures.gate_figure(gates.tokens, means, gates.layers)
        draw("gates", "Gates on held-out text", caption, figure)
    if loads := _by_layer(records, "expert_load"):
        caption = (
            "Left: mean over the last tenth of the records. Right: each layer's busiest expert,"
            " smoothed."
        )
        draw("experts", "Expert load", caption, figures.expert_figure(loads))
    return sections


def _norms(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The logged gradient norms by name."""
    named = {"all": curve(records, "grad_norm"), "memory": curve(records, "grad_norm_memory")}
    return {name: norm for name, norm in named.items() if len(norm.steps)}


def _by_layer(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Curve]:
    """The curves of METRIC/LAYER by layer id, ascending."""
    names = {name for record in records for name in record if name.startswith(f"{metric}/")}
    layers = sorted((name.split("/", 1)[1] for name in names), key=lambda x: (len(x), x))
    return {layer: curve(records, f"{metric}/{layer}") for layer in layers}


def _memory_panels(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Hit rate, utilisation and mean gate by Engram layer, as far as they were logged."""
    titles = {"hit_rate": "Hit rate", "utilisation": "Utilisation", "gate": "Gate"}
    panels: dict[str, dict[str, Curve]] = {}
    for metric, title in titles.items():
        for layer, found in _by_layer(records, metric).items():
            values = found.values.reshape(len(found.steps), -1).mean(axis=1)
            panels.setdefault(title, {})[f"layer {layer}"] = Curve(found.steps, values)
    return panels
