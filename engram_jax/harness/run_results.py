"""What evaluations have found about a checkpoint, in numbers for a table: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.results import LM_EVAL, LONG_PPL, TEXTS, read_results
from engram_jax.checkpoint.run_record import step_number
from engram_jax.checkpoint.workdir import (
    HELD_OUT_DOCUMENTS,
    check_trained,
    checkpoint_steps,
    file_of_step,
    parse_checkpoint,
)
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_arrays

Record = Mapping[str, Any]
# What makes the scored model another one than the checkpoint (evaluation/text_scores.py).
_SWITCHES = ("ema_decay", "off_layers", "off_orders")


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    stderr: its standard error, None = not known; bound: it is the largest that it can be. how: what
    it was asked for with, beside the checkpoint: numbers of a row with different ones are not
    alike.
    """

    value: float
    stderr: float | None = None
    bound: bool = False
    how: str = ""


@dataclass(frozen=True)
class RunResults:
    """A checkpoint and what was found about it. records: of checkpoint/results.py, the newest
    first, without those of models with something switched off, whose number is `left_out`."""

    label: str
    workdir: Path
    step: int
    records: list[Record]
    left_out: int
    held_out: Cell | None

    def of_kind(self, kind: str) -> Iterator[Record]:
        return (record for record in self.records if record["kind"] == kind)


def open_runs(given: Sequence[str]) -> list[RunResults]:
    """The checkpoints of WORKDIR or WORKDIR@STEP, in order. Raises UserError for one that is not
    there, or there twice."""
    found: list[RunResults] = []
    named = [parse_checkpoint(text, f"--runs={shown(text)}") for text in given]
    folders = {workdir.resolve() for workdir, _ in named}
    for text, (workdir, wanted) in zip(given, named, strict=True):
        check_trained(workdir)
        step = step_number(workdir, wanted)
        if step not in checkpoint_steps(workdir):
            there = ", ".join(map(str, checkpoint_steps(workdir)))
            raise UserError(f"--runs={shown(text)}: there are checkpoints of steps {there}")
        if any((r.workdir.resolve(), r.step) == (workdir.resolve(), step) for r in found):
            raise UserError(f"--runs={shown(text)}: is there twice")
        records = read_results(workdir, step)
        kept = [r for r in reversed(records) if not any(key in r["asked"] for key in _SWITCHES)]
        name = workdir.resolve().name
        alone = sum(folder.name == name for folder in folders) == 1
        label = f"{name if alone else shown(workdir)}, step {step:,}"
        held_out = _held_out(workdir, step)
        found.append(RunResults(label, workdir, step, kept, len(records) - len(kept), held_out))
    return found


def _held_out(workdir: Path, step: int) -> Cell | None:
    """The loss of the held-out split, nats per token, from those of its documents; its error is
    over documents, by the delta method."""
    file = file_of_step(workdir, HELD_OUT_DOCUMENTS, step)
    if not file.is_file():
        return None
    with open_arrays(file) as arrays:
        nats, targets = arrays["nats"], arrays["targets"].astype(float)
        if int(arrays["step"]) != step:
            return None
    count, whole = int((targets > 0).sum()), targets.sum()
    loss = float(nats.sum() / whole)
    if count < 2:
        return Cell(loss)
    spread = float(((nats - loss * targets) ** 2).sum())
    return Cell(loss, math.sqrt(count / (count - 1) * spread) / float(whole))


def text_cells(run: RunResults) -> dict[str, Cell]:
    """Bits per byte by the name of a text, of the newest result that has it."""
    found: dict[str, Cell] = {}
    for record in run.of_kind(TEXTS):
        for name, of in record["result"]["texts"].items():
            if of["bits_per_byte"] is not None:
                how = f"sequences of {record['result']['seq_len']:,}, text {of['digest'][:8]}"
                cell = Cell(of["bits_per_byte"], of["bits_per_byte_stderr"], how=how)
                found.setdefault(name, cell)
    return found


def long_ppl_cells(run: RunResults) -> dict[tuple[str, str, int], Cell]:
    """(LongPPL or perplexity, name of a text, context) -> number."""
    found: dict[tuple[str, str, int], Cell] = {}
    for record in run.of_kind(LONG_PPL):
        result, asked = record["result"], record["asked"]
        rule = f"truncated {result['truncated']:,}, stride {result['stride']:,}"
        # By itself every checkpoint is judged by another one.
        how = f"evaluator {result['evaluator']}, {rule}, texts {asked['texts'][:8]}"
        for name, of in result["texts"].items():
            for key, title in (("long_ppl", "LongPPL"), ("perplexity", "perplexity")):
                value, error = of[key], of[f"{key}_stderr"]
                if isinstance(value, float):
                    cell = Cell(value, error, how=how)
                    found.setdefault((title, name, result["context"]), cell)
    return found


def task_cell(
    run: RunResults, tasks: Sequence[str], metric: str, scale: float = 100.0
) -> Cell | None:
    """The mean of a metric over tasks of lm-eval, of the newest result that has all of them; None
    if there is none. metric: NAME or NAME,FILTER."""
    for record in run.of_kind(LM_EVAL):
        result = record["result"]
        parts = [_task(result, task, metric) for task in tasks]
        if not parts or any(part is None for part in parts):
            continue
        cells = [part for part in parts if part is not None]
        errors = [cell.stderr for cell in cells]
        error = None
        if all(e is not None for e in errors):
            error = scale * math.sqrt(sum(e**2 for e in errors if e is not None)) / len(cells)
        how = _how(record, tasks)
        value = scale * sum(cell.value for cell in cells) / len(cells)
        return Cell(value, error, any(cell.bound for cell in cells), how)
    return None


def _task(result: Record, task: str, metric: str) -> Cell | None:
    found = result["results"].get(task) or {}
    for key, value in found.items():
        name, _, kept = key.partition(",")
        if metric not in (name, key) or not isinstance(value, float | int) or value < 0:
            continue  # lm-eval's `ruler` says -1 of a length without samples
        error = found.get(f"{name}_stderr,{kept}")
        if isinstance(error, float | int):
            return Cell(float(value), float(error))
        return Cell(float(value), *_largest_error(result, task, float(value)))
    return None


def _largest_error(result: Record, task: str, value: float) -> tuple[float | None, bool]:
    """(standard error, True) of a mean of numbers in [0, 1] that lm-eval has no error for: none has
    a larger one than those that are 0 and 1. (None, False) where the number of samples is not
    known."""
    own = [v for k, v in result["results"][task].items() if k.partition(",")[0].isdecimal()]
    samples = (result.get("n-samples") or {}).get(task) or {}
    count = samples.get("effective")
    lengths = sum(isinstance(v, float | int) and v >= 0 for v in own)
    if not count or lengths > 1 or not 0 <= value <= 1:
        return None, False
    return math.sqrt(value * (1 - value) / count), True


def _how(record: Record, tasks: Sequence[str]) -> str:
    result, limit = record["result"], record["asked"].get("limit")
    groups = result.get("group_subtasks") or {}
    leaves = {leaf for task in tasks for leaf in (task, *_leaves(groups, task))}
    shots = {result.get("n-shot", {}).get(leaf) for leaf in leaves} - {None}
    told = [f"{'/'.join(map(str, sorted(shots, key=str)))} shots"] if shots else []
    told += [f"limit {limit:g}"] if limit else []
    return ", ".join([*told, *map(str, record["asked"].get("changed_settings", []))])


def _leaves(groups: Mapping[str, Sequence[str]], task: str) -> Iterator[str]:
    for inner in groups.get(task) or ():
        yield inner
        yield from _leaves(groups, inner)


def tasks_of(run: RunResults) -> dict[str, list[str]]:
    """Task or group of lm-eval -> its metrics (NAME,FILTER); what is part of a group that was
    scored, too, is left out."""
    found: dict[str, list[str]] = {}
    for record in run.of_kind(LM_EVAL):
        result = record["result"]
        inside = {task for tasks in (result.get("group_subtasks") or {}).values() for task in tasks}
        for task, metrics in result["results"].items():
            names = [
                key
                for key, value in metrics.items()
                if "," in key and "_stderr," not in key and isinstance(value, float | int)
            ]
            if task not in inside and names:
                found.setdefault(task, names)
    return found


def lengths_of(run: RunResults) -> set[int]:
    """The lengths of `ruler`'s tasks that have samples."""
    return {
        int(name)
        for record in run.of_kind(LM_EVAL)
        for metrics in record["result"]["results"].values()
        for name, value in ((key.partition(",")[0], v) for key, v in metrics.items())
        if name.isdecimal() and isinstance(value, float | int) and value >= 0
    }
