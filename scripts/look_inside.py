"""Analyse a pair of models over several seeds, and keep what was found as one page.

    python -m scripts.look_inside runs/depth docs/results/look_inside \\
        --text=docs/results/look_inside/text.txt

runs/depth is the folder of the sweep configs/experiments/depth.py. For every seed that both models
have ended with, `--mode=analyse` compares them (LogitLens, similar layers, parts of the memory off)
and leaves its page and its record in the run's folder; a record that is there already is taken as
it is. --text: a text whose gates are shown, of the first seed. Written are report.md, its pictures,
and analyses.json, the numbers of every seed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.checkpoint.workdir import LOSSES
from engram_jax.lab.statistics import Interval, t_interval
from engram_jax.report.analysis_figures import cka_figure, sensitivity_figure
from engram_jax.report.figures import COLOURS, INK, canvas, style
from engram_jax.report.page import Section, as_markdown

ROOT = Path(__file__).resolve().parent.parent
PARTS = "lens,cka,sensitivity"
RUN_NAME = re.compile(r"variant=(moe|engram),seed=(\d+),")
Record = Mapping[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("sweep", type=Path)
    arguments.add_argument("target", type=Path)
    arguments.add_argument("--text", type=Path)
    given = arguments.parse_args()
    pairs = ended_pairs(given.sweep)
    if not pairs:
        sys.exit(f"error: {given.sweep}: no seed for which both models have ended")
    seeds = {seed: analysed(*pair) for seed, pair in pairs.items()}
    given.target.mkdir(parents=True, exist_ok=True)
    sections = report_sections(seeds, given.target)
    if given.text is not None:
        sections.append(gates(next(iter(pairs.values()))[1], given.text, given.target))
    lines = [f"{json.dumps(str(seed))}: {json.dumps(record)}" for seed, record in seeds.items()]
    write(given.target / "analyses.json", "{" + ",\n".join(lines) + "}\n")
    subtitle = (
        f"{len(seeds)} seeds. Made by `python -m scripts.look_inside {given.sweep} {given.target}`"
        " after the sweep `configs/experiments/depth.py`; what each number means:"
        " [docs/analysis.md](../../analysis.md). ±: 95 % by Student's t over the seeds."
    )
    write(given.target / "report.md", as_markdown(TITLE, subtitle, sections, given.target))


TITLE = "Inside a MoE and an Engram model of 8 layers"


def write(path: Path, text: str) -> None:
    path.write_text(text)
    print(path)


def ended_pairs(sweep: Path) -> dict[int, tuple[Path, Path]]:
    """Seed -> workdirs of the MoE and of Engram, of the seeds that both have ended with."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(sweep.glob(f"*/{LOSSES}")):
        if named := RUN_NAME.match(path.parent.name):
            found.setdefault(int(named[2]), {})[named[1]] = path.parent
    whole = {seed: pair for seed, pair in found.items() if len(pair) == 2}
    return {seed: (pair["moe"], pair["engram"]) for seed, pair in sorted(whole.items())}


def analysed(moe: Path, engram: Path) -> dict[str, Any]:
    """What is kept of a pair: the analysis of Engram against the MoE, and both models' losses and
    scores on the tasks."""
    record = engram / "analysis.json"
    if not record.exists():
        analyse(engram, f"--against={moe}", f"--what={PARTS}")
    whole = json.loads(record.read_text())
    found = {part: whole[part] for part in PARTS.split(",")}
    for name, run in (("moe", moe), ("engram", engram)):
        losses = json.loads((run / LOSSES).read_text())
        found[name] = {"held_out_loss": held_out_loss(losses)}
        scores = run / "task_scores.json"
        if scores.exists():
            found[name]["tasks"] = json.loads(scores.read_text())["groups"]
    return found


def held_out_loss(losses: Record) -> float:
    nats = losses["held_out_loss"]["nats_per_token"]
    return next(iter(nats.values()))  # the model's own name is the first


def analyse(run: Path, *flags: str) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "--mode=analyse", f"--workdir={run}"]
    subprocess.run([*command, *flags], check=True, cwd=ROOT)


def gates(engram: Path, text: Path, target: Path) -> Section:
    """Of a text, by the analysis of one model."""
    page = target / "gates.html"
    analyse(engram, "--what=gates", f"--text={text}", f"--output={page}")
    (target / "gates" / "gates.png").replace(target / "gates.png")
    for path in sorted((target / "gates").iterdir()):
        path.unlink()
    (target / "gates").rmdir()
    for path in (page, page.with_suffix(".json")):
        path.unlink()
    caption = (
        f"Of [the text]({text.name}), the first seed; darker is more open, by layer and branch."
    )
    return Section("Gates on natural English", caption, picture=target / "gates.png")


def report_sections(seeds: Mapping[int, Record], target: Path) -> list[Section]:
    found = list(seeds.values())

    def over_seeds(value: Callable[[Record], float]) -> Interval:
        return t_interval([value(each) for each in found])

    sections = [losses(over_seeds), *lens(found, target), *similar(found, target)]
    sections += sensitivity(found, over_seeds, target)
    if all("tasks" in each[name] for each in found for name in ("moe", "engram")):
        sections.append(tasks(found))
    return sections


def losses(over_seeds: Callable[..., Interval]) -> Section:
    rows = (
        ("MoE", plain(over_seeds(lambda f: f["moe"]["held_out_loss"]))),
        ("Engram", plain(over_seeds(lambda f: f["engram"]["held_out_loss"]))),
        (
            "difference",
            plain(over_seeds(lambda f: f["engram"]["held_out_loss"] - f["moe"]["held_out_loss"])),
        ),
    )
    return Section("Held-out loss", header=("", "nats per token"), rows=rows)


def lens(found: Sequence[Record], target: Path) -> list[Section]:
    """KL to the last layer, by layer, of both, and their paired difference."""
    engram, moe = (np.array([f["lens"]["models"][k]["kl"] for f in found]) for k in (0, 1))
    memory = found[0]["lens"]["models"][0]["engram_layers"]
    figure, (axes,) = canvas(8.6, 3.8)
    style(axes, "", "layer", "KL to the last layer, nats per token")
    for values, colour, name in ((moe, COLOURS[0], "MoE"), (engram, COLOURS[1], "Engram")):
        shown = values[:, :-1]  # the last is 0
        layers = np.arange(shown.shape[1])
        axes.plot(layers, shown.mean(0), color=colour, marker="o", markersize=3.5, label=name)
        axes.fill_between(layers, shown.min(0), shown.max(0), color=colour, alpha=0.2)
    axes.plot(memory, engram.mean(0)[memory], "D", color=COLOURS[1], markersize=7, fillstyle="none")
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    figure.savefig(target / "lens.png")
    rows = tuple(
        (
            str(layer),
            f"{moe[:, layer].mean():.3f}",
            f"{engram[:, layer].mean():.3f}",
            plain(t_interval(engram[:, layer] - moe[:, layer])),
        )
        for layer in range(engram.shape[1])
    )
    caption = "The shade is from the lowest to the highest seed; diamonds are layers with a memory."
    return [
        Section("LogitLens", caption, picture=target / "lens.png"),
        Section(
            "KL by layer",
            header=("after layer", "MoE", "Engram", "Engram - MoE"),
            rows=rows,
        ),
    ]


def similar(found: Sequence[Record], target: Path) -> list[Section]:
    """The mean heat map, and which layer of the MoE each of Engram's is most like."""
    cka = np.array([f["cka"]["cka"] for f in found])
    alignment = np.array([f["cka"]["soft_alignment"] for f in found])
    mean = {"cka": cka.mean(0), "soft_alignment": alignment.mean(0)}
    mean |= {"first": "the MoE", "second": "Engram"}
    cka_figure(mean).savefig(target / "cka.png")
    tokens = ", ".join(str(f["cka"]["entity_tokens"]) for f in found)
    rule = found[0]["cka"]["entities"]
    caption = (
        f"Linear CKA, the mean over seeds, at {tokens} ends of entities ({rule});"
        " the line is the soft alignment of Engram's layers."
    )
    header = ("layer of Engram", "is like layer of the MoE")
    rows = tuple((str(i), plain(t_interval(column))) for i, column in enumerate(alignment.T))
    return [
        Section("Similar layers", caption, picture=target / "cka.png"),
        Section("Soft alignment", header=header, rows=rows),
    ]


def sensitivity(
    found: Sequence[Record], over_seeds: Callable[..., Interval], target: Path
) -> list[Section]:
    """What the loss rises by without parts of the memory; heads are left to analyses.json."""
    names = [part["part"] for part in found[0]["sensitivity"]["parts"]]
    shown = [name for name in names if ", head " not in name]

    def rise(name: str) -> Callable[[Record], float]:
        return lambda f: next(p["rise"] for p in f["sensitivity"]["parts"] if p["part"] == name)

    rises = {name: over_seeds(rise(name)) for name in shown}
    bars = [{"part": name, "rise": interval.mean} for name, interval in rises.items()]
    sensitivity_figure(bars).savefig(target / "sensitivity.png")
    rows = tuple((name, plain(interval, sign=True)) for name, interval in rises.items())
    counted = ", ".join(f"{f['sensitivity']['loss']:.4f}" for f in found)
    caption = f"Loss with all on, by seed: {counted}."
    title = "What the loss owes to the memory"
    return [
        Section(title, caption, picture=target / "sensitivity.png"),
        Section("Parts off", header=("off", "loss rises by"), rows=rows),
    ]


def tasks(found: Sequence[Record]) -> Section:
    """Accuracy by likelihood of both models, and Engram's without its memory; items of all seeds
    together, for the seeds have facts and items of their own."""
    rows = []
    for k, group in enumerate(found[0]["engram"]["tasks"]):
        times = f", stated {group['frequency']} times an epoch" if group["frequency"] else ""
        moe, on = (_pooled(found, name, k, "on") for name in ("moe", "engram"))
        off = _pooled(found, "engram", k, "off")
        chance = group["chance"]
        error = max(on[1], _error(chance, on[2]))
        above = on[0] - chance > 3 * error
        kept = f"{(off[0] - chance) / (on[0] - chance):.0%}" if above else "-"
        rows.append(
            (
                f"{group['task']} {group['difficulty']}{times}",
                str(on[2]),
                *(f"{p:.1%} ± {error:.1%}" for p, error, _ in (moe, on, off)),
                kept,
            )
        )
    header = ("task", "items", "MoE", "Engram", "Engram, memory off", "retained")
    caption = (
        "Accuracy by likelihood with its standard error; chance is 10 %. Retained: (off - chance) /"
        " (on - chance), where on is more than 3 standard errors above chance."
    )
    return Section("Synthetic tasks", caption, header=header, rows=tuple(rows))


def _pooled(found: Sequence[Record], model: str, group: int, name: str) -> tuple[float, float, int]:
    """(accuracy, its standard error, items)."""
    groups = [f[model]["tasks"][group] for f in found]
    items = sum(g["items"] for g in groups)
    accuracy = sum(g["items"] * g[name]["accuracy"] for g in groups) / items
    return accuracy, _error(accuracy, items), items


def _error(p: float, items: int) -> float:
    return float(np.sqrt(p * (1 - p) / items))


def plain(interval: Interval, *, sign: bool = False) -> str:
    """A mean and half its interval; the mean alone of one seed."""
    mean = f"{interval.mean:+.4f}" if sign else f"{interval.mean:.4f}"
    return mean if np.isnan(interval.low) else f"{mean} ± {interval.high - interval.mean:.4f}"


if __name__ == "__main__":
    main()
