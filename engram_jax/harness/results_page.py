"""--mode=report: checkpoints side by side in the paper's two tables, as HTML, Markdown and JSON.

It shows what evaluations wrote into the runs' folders (checkpoint/results.py) and computes nothing
anew: what was not measured is a dash. Numbers of a row that were asked for differently are said not
to be alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_jax.config.errors import UserError
from engram_jax.hardware.storage import write_text
from engram_jax.harness.paper import BENCHMARKS, RULER
from engram_jax.harness.run_results import (
    Cell,
    RunResults,
    lengths_of,
    long_ppl_cells,
    open_runs,
    task_cell,
    tasks_of,
    text_cells,
)
from engram_jax.monitoring.metrics import json_value
from engram_jax.report.page import Section, as_html, as_markdown

TITLE = "Checkpoints side by side"
FILES = ("results.html", "results.md", "results.json")


@dataclass(frozen=True)
class Row:
    """A line of a table: a number for each run, None = not measured. unit: as shown. lower: whether
    less is better."""

    label: str
    cells: list[Cell | None]
    unit: str = "%"
    lower: bool = False

    @property
    def unlike(self) -> bool:
        """Whether its numbers were asked for differently."""
        return len({cell.how for cell in self.cells if cell}) > 1


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[Row]


def tables_of(runs: Sequence[RunResults]) -> list[Table]:
    """Language modelling and benchmarks; long contexts; what else was scored."""
    rows = []
    if any(run.held_out for run in runs):
        rows.append(Row("held-out loss", [run.held_out for run in runs], "nats per token", True))
    of_texts = [text_cells(run) for run in runs]
    for name in dict.fromkeys(name for found in of_texts for name in found):
        cells = [found.get(name) for found in of_texts]
        rows.append(Row(name, cells, "bits per byte", True))
    for benchmark in BENCHMARKS:
        label = f"{benchmark.name} ({benchmark.metric.partition(',')[0]})"
        rows += _measured(label, runs, benchmark.tasks, benchmark.metric)
    tables = [Table("Language modelling and benchmarks", rows)]
    tables.append(Table("Long contexts", _long(runs)))
    tables.append(Table("Other tasks", _others(runs)))
    return [table for table in tables if table.rows]


def _measured(
    label: str, runs: Sequence[RunResults], tasks: Sequence[str], metric: str, scale: float = 100.0
) -> list[Row]:
    cells = [task_cell(run, tasks, metric, scale) for run in runs]
    return [Row(label, cells, "%" if scale == 100 else "")] if any(cells) else []


def _long(runs: Sequence[RunResults]) -> list[Row]:
    of_texts, rows = [long_ppl_cells(run) for run in runs], []
    keys = dict.fromkeys(key for found in of_texts for key in found)
    for title, name, context in sorted(keys, key=lambda key: (key[2], key[1], key[0])):
        cells = [found.get((title, name, context)) for found in of_texts]
        rows.append(Row(f"{title} {name}, {context:,} tokens", cells, "", True))
    for length in sorted(set().union(*map(lengths_of, runs))):
        for column in RULER:
            label = f"RULER {column.name}, {length:,} tokens"
            rows += _measured(label, runs, column.tasks, str(length))
    return rows


def _others(runs: Sequence[RunResults]) -> list[Row]:
    """Tasks that no other table has shown; each metric as lm-eval has it."""
    shown = {task for benchmark in BENCHMARKS for task in benchmark.tasks}
    lengths = set().union(*map(lengths_of, runs))
    for column in RULER:
        if any(task_cell(r, column.tasks, str(length)) for r in runs for length in lengths):
            shown |= set(column.tasks)
    others: dict[tuple[str, str], None] = {}
    for run in runs:
        for task, metrics in tasks_of(run).items():
            if task not in shown:
                others |= dict.fromkeys((task, metric) for metric in metrics)
    rows = []
    for task, metric in others:
        rows += _measured(f"{task} ({metric})", runs, (task,), metric, 1.0)
    return rows


def number(cell: Cell | None, unit: str) -> str:
    """A cell as text."""
    if cell is None:
        return "-"
    digits = 2 if unit == "%" else 4
    if cell.stderr is None:
        return f"{cell.value:.{digits}f}"
    return f"{cell.value:.{digits}f} ± {'≤ ' if cell.bound else ''}{cell.stderr:.{digits}f}"


def sections_of(runs: Sequence[RunResults], tables: Sequence[Table]) -> list[Section]:
    found = []
    for table in tables:
        rows = []
        for row in table.rows:
            unit = ", ".join(filter(None, [row.unit, "lower is better" if row.lower else ""]))
            label = f"{row.label}{' [not alike]' if row.unlike else ''}"
            rows.append((label, unit, *(number(cell, row.unit) for cell in row.cells)))
        header = ("", "", *(run.label for run in runs))
        caption = "± standard error; ≤: the largest that it can be. A dash: not measured."
        found.append(Section(table.title, caption, header=header, rows=tuple(rows)))
        if unlike := [row for row in table.rows if row.unlike]:
            header = ("not alike", *(run.label for run in runs))
            told = tuple(
                (row.label, *(cell.how if cell else "-" for cell in row.cells)) for row in unlike
            )
            about = "What the numbers of these rows were asked for with differs."
            found.append(Section(f"{table.title}: not alike", about, header=header, rows=told))
    if left := [f"{run.label}: {run.left_out:,}" for run in runs if run.left_out]:
        about = f"Results of models with something switched off, or averaged: {'; '.join(left)}."
        found.append(Section("Left out", about))
    return found


def as_dict(runs: Sequence[RunResults], tables: Sequence[Table]) -> dict[str, Any]:
    """The tables as JSON values: for each row a value per run, null = not measured."""
    return {
        "runs": [
            {
                "name": run.label,
                "workdir": str(run.workdir),
                "step": run.step,
                "left_out": run.left_out,
            }
            for run in runs
        ],
        "tables": [
            {
                "title": table.title,
                "rows": [
                    {
                        "name": row.label,
                        "unit": row.unit,
                        "lower_is_better": row.lower,
                        "alike": not row.unlike,
                        "cells": [None if cell is None else asdict(cell) for cell in row.cells],
                    }
                    for row in table.rows
                ],
            }
            for table in tables
        ],
    }


def report(given: Sequence[str], output: Path | None, as_json: bool) -> str:
    """The tables of WORKDIR or WORKDIR@STEP, ..., as Markdown or JSON; written into the folder
    `output` in all three forms, too. Raises UserError for a run that is not there, and where none
    has a result."""
    runs = open_runs(given)
    tables = tables_of(runs)
    if not tables:
        raise UserError(
            "--runs: nothing was measured of any of them; --mode=evaluate, lm-eval and long-ppl"
            " keep what they find in the run's folder"
        )
    sections = sections_of(runs, tables)
    text = json.dumps(json_value(as_dict(runs, tables)), indent=1, allow_nan=False) + "\n"
    page = as_markdown(TITLE, "", sections, Path())
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in zip(FILES, (as_html(TITLE, "", sections), page, text), strict=True):
            write_text(output / name, content)
    return (text if as_json else page).rstrip("\n")
