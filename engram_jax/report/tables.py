"""The tables of a report: what was trained on what, how it went, and what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_jax.checkpoint.run_record import origin_of
from engram_jax.config import Config
from engram_jax.config.difference import ABSENT, differences, flat
from engram_jax.report.page import Rows, Section
from engram_jax.tasks.score_table import COLUMNS, as_row, heading

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A metric over training: steps and values, both [n]."""

    steps: np.ndarray
    values: np.ndarray


def curve(records: Sequence[Record], name: str) -> Curve:
    """A metric over its steps; of two records of a step, the later one."""
    found = {record["step"]: record[name] for record in records if name in record}
    steps = sorted(found)
    return Curve(np.array(steps, np.int64), np.array([found[s] for s in steps], np.float64))


def subtitle(losses: Record, model: Record, launch: Record) -> str:
    """One line under the title."""
    parts: list[str] = []
    if model:
        parts.append(f"{_short(model['total_params'])} parameters")
    if losses:
        parts.append(f"{losses['step']:,} steps")
        parts.append(f"{losses['data']['source']}")
    if launch:
        parts.append(f"{launch['time'][:10]}, commit {commit(launch)[:12]}")
    return ", ".join(parts)


def loss_section(losses: Record, name: str) -> Section:
    """The held-out loss beside the count models'. losses: of losses.json. name: the model's."""
    held_out = losses["held_out_loss"]
    found, bits = held_out["nats_per_token"], held_out["bits_per_byte"]
    mine = float(found[name])
    rows = [
        (
            title,
            f"{float(loss):.4f}",
            f"{_exp(float(loss)):,.2f}",
            f"{float(bits[title]):.4f}",
            "" if title == name else _difference(mine, float(loss)),
        )
        for title, loss in found.items()
    ]
    header = ("", "nats per token", "perplexity", "bits per byte", "")
    counts = " Count models are fitted to the tokens that the model trained on." if rows[1:] else ""
    caption = f"held_out_loss after step {losses['step']:,}: {_of(held_out)}.{counts}"
    return Section("Held-out loss", caption, header=header, rows=tuple(rows))


def context_section(losses: Record) -> Section | None:
    """The held-out losses by whether the n-gram of context was seen; None if not searched."""
    found = losses["held_out_loss"].get("by_context_ngram", {})
    rows = []
    for order, sides in found.items():
        for side, of in sides.items():
            means = of["nats_per_token"]
            cells = [
                "-" if means[title] is None else f"{float(means[title]):.4f}" for title in means
            ]
            rows.append((f"{order}-gram {side}", f"{of['targets']:,}", *cells))
    if not rows:
        return None
    titles = list(losses["held_out_loss"]["nats_per_token"])
    caption = (
        "Nats per token, by whether the n tokens before a target (raw ids, within document and"
        " sequence; those an Engram looks up there) stand in what the run was trained on."
    )
    header = ("context", "predicted tokens", *titles)
    return Section("Held-out loss by context", caption, header=header, rows=tuple(rows))


def task_section(scores: Record) -> Section:
    """Synthetic tasks with the memory on and off. scores: of task_scores.json."""
    caption = (
        f"After {heading(scores)}. Times: how often an epoch states the fact. Accuracy by"
        " likelihood among the candidates and by greedy decoding, with standard errors; retained:"
        " (off - chance) / (on - chance), where on is more than 3 standard errors above chance."
    )
    rows = tuple(as_row(record) for record in scores["groups"])
    return Section("Synthetic tasks", caption, header=tuple(n for n, _ in COLUMNS), rows=rows)


def run_rows(records: Sequence[Record], losses: Record, launch: Record) -> Rows:
    """(name, value) pairs of the training run. launch: the last one of run.json."""
    config = launch.get("config", {})
    rows: list[tuple[str, str]] = []
    train, validation = curve(records, "loss"), curve(records, "validation_loss")
    steps = losses.get("step", max((r["step"] for r in records), default=0))
    wanted = config.get("train", {}).get("steps", steps)
    rows.append(("steps", f"{steps:,}" + (f" of {wanted:,}" if wanted != steps else "")))
    if config:
        tokens = config["data"]["batch_size"] * config["data"]["seq_len"]
        rows.append(("tokens", f"{steps * tokens:,} in batches of {tokens:,}"))
    if len(validation.steps):
        of = f"; {_of(losses['validation_loss'])}" if losses else ""
        final = f"{validation.values[-1]:.4f} after step {validation.steps[-1]:,}{of}"
        rows.append(("validation loss, last", final))
        if np.isfinite(validation.values).any():
            best = int(np.nanargmin(validation.values))
            at = f"{validation.values[best]:.4f} after step {validation.steps[best]:,}"
            rows.append(("validation loss, lowest", at))
    if len(train.steps):
        last = max(1, min(10, len(train.steps) // 4))
        over = f"mean of {last} batches from step {train.steps[-last]:,} to {train.steps[-1]:,}"
        of = over if last > 1 else f"of the batch of step {train.steps[-1]:,}"
        rows.append(("training loss, last", f"{train.values[-last:].mean():.4f}, {of}"))
    speeds = (
        ("tokens_per_second", "tokens per second, median", "{:,.0f}", np.median),
        ("step_seconds", "seconds per step, median", "{:.4g}", np.median),
        ("mfu", "model FLOPs utilisation, median", "{:.1%}", np.median),
        ("goodput", "goodput", "{:.1%}", lambda values: values[-1]),
    )
    for name, label, shown, pick in speeds:
        if len(values := curve(records, name).values):
            rows.append((label, shown.format(float(pick(values)))))
    return tuple(rows)


def model_rows(model: Record) -> Rows:
    """model: what `describe.describe` returns."""
    total = model["total_params"]
    rows = [("parameters", f"{total:,}", "")]
    for part, count in sorted(model["parts"].items(), key=lambda item: -item[1]):
        rows.append((f"  {part}", f"{count:,}", f"{count / total:.1%}"))
    rows.append(("active per token", f"{model['active_params']:,}", "without token embedding"))
    rows.append(("training FLOPs per token", f"{model['flops_per_token']:,.0f}", ""))
    for layer, memory in model["engram"].items():
        orders = " and ".join(map(str, memory["orders"]))
        shape = f"{memory['rows']:,} rows of {memory['dim']}"
        heads = f"n-grams of {orders}, {memory['heads_per_order']} heads each"
        rows.append((f"memory at layer {layer}", shape, heads))
    return tuple(rows)


def data_rows(text: Record) -> Rows:
    """text: what `PreparedData.summary` returns."""
    rows = [("source", text["source"]), ("digest of the text", text["digest"])]
    for split, label in (("train", "to train on"), ("validation", "held out")):
        size = f"{text[f'{split}_bytes'] / 1e6:,.2f} MB, {text[f'{split}_tokens']:,} tokens"
        rows.append((label, f"{text[f'{split}_documents']:,} documents, {size}"))
    per_token = f"{text['validation_bytes_per_token']:.3f}"
    return (*rows, ("bytes per held-out token", per_token), ("Python", text["python"]))


def launch_rows(launches: Sequence[Record]) -> Rows:
    """How the last launch can be repeated, and which there were before. launches: of run.json."""
    launch, devices = launches[-1], launches[-1]["devices"]
    versions = (f"{name} {version}" for name, version in launch["versions"].items() if version)
    rows = [
        ("command", launch["command"]),
        ("commit", commit(launch)),
        ("started", f"{launch['time']} at step {launch['resumed_at']:,}"),
        ("devices", f"{devices['count']} x {devices['kind']}, host {launch['host']}"),
        ("versions", ", ".join(versions)),
    ]
    for before in reversed(launches[:-1]):
        at = f"{before['time']} at step {before['resumed_at']:,}, commit {commit(before)}"
        rows.append(("started before", at))
    rows += origin_rows(origin_of(launches))
    for each in launches:
        if changed := each.get("changed_settings"):
            rows.append((f"changed at step {each['resumed_at']:,}", ", ".join(map(str, changed))))
    return tuple(rows)


def origin_rows(origin: Record | None) -> list[tuple[str, str]]:
    """Which checkpoints a run descends from, the nearest first. origin: of `origin_of`."""
    rows: list[tuple[str, str]] = []
    while origin:
        text = (origin.get("data") or {}).get("digest") or "unknown"
        told = (
            f"step {origin['step']:,} of {origin['name']} in {origin['workdir']}, checkpoint"
            f" {origin['digest'][:16]}, optimizer {origin['optimizer']}, its text's digest {text}"
        )
        if changed := origin.get("changed_settings"):
            told += ", other here: " + ", ".join(map(str, changed))
        rows.append(("initialised from", told))
        origin = origin.get("initialised_from")
    return rows


def configuration_section(config: Record) -> Section:
    """Every key, those whose value is not the default first."""
    mine = flat(config)
    changed = {k: default for k, _, default in differences(config, Config()) if k in mine}
    rows = [(k, _value(mine[k]), _value(default)) for k, default in changed.items()]
    rows += [(k, _value(v), "") for k, v in mine.items() if k not in changed]
    caption = f"{len(changed)} keys that are not at their default come first."
    header = ("key", "value", "default, where it differs")
    return Section("Configuration", caption, header=header, rows=tuple(rows), folded=True)


def commit(launch: Record) -> str:
    """The commit of a launch of run.json."""
    found = launch.get("git")
    if not found:
        return "unknown"
    return found["commit"] + (" with changes" if found["dirty"] else "")


def _of(loss: Record) -> str:
    """loss: an entry of losses.json."""
    return f"{loss['of']}, {loss['targets']:,} predicted tokens"


def _difference(mine: float, loss: float) -> str:
    side = "below" if mine <= loss else "above"
    return f"the model is {abs(loss - mine):.4f} {side}" if math.isfinite(mine - loss) else ""


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _short(number: int) -> str:
    for power, suffix in ((1e9, " B"), (1e6, " M")):
        if number >= power:
            return f"{number / power:.2f}{suffix}"
    return f"{number:,}"


def _value(value: Any) -> str:
    """Of a configuration, or of one that JSON has made lists of the tuples of."""
    return "" if value is ABSENT else str(list(value) if isinstance(value, tuple) else value)
