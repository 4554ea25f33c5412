"""Scores of synthetic tasks (evaluation/tasks.py) as a table, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    ("task", 11),
    ("level", 6),
    ("times", 5),
    ("items", 5),
    ("chance", 6),
    ("on", 12),
    ("on, greedy", 12),
    ("off", 12),
    ("off, greedy", 12),
    ("retained", 8),
)  # and their widths


def heading(result: Mapping[str, Any]) -> str:
    """What was scored, in a line."""
    head = f"step {result['step']:,}, {result['epochs']:.2f} epochs of the training text"
    if result["off_layers"]:
        head += f"; off: Engram layers {', '.join(map(str, result['off_layers']))}"
    if result["too_long"]:
        head += f"; {result['too_long']:,} items are longer than the trained sequences: left out"
    return head


def table(result: Mapping[str, Any]) -> str:
    """The result as text for a terminal."""
    lines = [heading(result), "", "  ".join(f"{name:>{width}}" for name, width in COLUMNS)]
    for record in result["groups"]:
        cells = zip(as_row(record), COLUMNS, strict=True)
        lines.append("  ".join(f"{cell:>{width}}" for cell, (_, width) in cells))
    return "\n".join(lines)


def as_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A record's cells, as named by `COLUMNS`; accuracies in percent with their standard errors."""

    def percent(name: str) -> str:
        found = record.get(name)
        if found is None:
            return ""
        return f"{found['accuracy']:.1%} ±{found['standard_error']:.1%}"

    kept = record.get("retained")
    return (
        record["task"],
        record["difficulty"],
        str(record["frequency"] or ""),
        str(record["items"]),
        f"{record['chance']:.1%}",
        *(percent(name) for name in ("on", "on_greedy", "off", "off_greedy")),
        "" if kept is None else f"{kept:.0%}",
    )
