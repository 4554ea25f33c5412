"""The tidy table of an experiment: one row for each finished run, from what its workdir holds."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.run_record import config_of_launch, read_launches
from engram_jax.checkpoint.workdir import RUN
from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.evaluation.target_losses import ORDERS
from engram_jax.hardware.storage import replacing
from engram_jax.lab.experiment import Launch
from engram_jax.lab.plan import Plan, attempts, held_out_loss
from engram_jax.lab.statistics import read_documents
from engram_jax.model.budgets import Budget, budget_of
from engram_jax.model.describe import table_geometry
from engram_jax.monitoring import goodput

Row = dict[str, Any]


def collect(plan: Plan) -> list[Row]:
    """One row per finished run of the plan: the trials of learning rates, then the runs."""
    rates = plan.chosen_rates()
    base = budget_of(plan.base())
    launches = dict.fromkeys((*plan.trials(), *plan.runs(rates)))
    rows = []
    for launch in launches:
        try:
            losses = plan.losses(launch)
        except UserError:  # the report says why (Plan.missing)
            continue
        if losses is not None:
            used = launch.rate == rates.get(launch.point.family) and launch.seed in plan.seeds
            used = used and launch.point in plan.points
            rows.append(_row(plan, launch, losses, base, used))
    return rows


def _row(plan: Plan, launch: Launch, losses: Mapping[str, Any], base: Budget, used: bool) -> Row:
    """used: it is a run at the chosen rate, not only a trial of one."""
    workdir, point = plan.workdir(launch), launch.point
    launches = read_launches(workdir / RUN)
    made = [x for x in launches if x.get("resumed_at", 0) < losses["step"]] or launches
    last = made[-1]
    config, _ = config_of_launch(workdir, last)
    budget, size = budget_of(config), table_size(config)
    tokens = losses["step"] * config.data.batch_size * config.data.seq_len
    off = budget.mismatch(base)
    documents = read_documents(workdir)
    by_seen = documents.losses_by_seen() if documents else {}
    account = goodput.read(workdir)
    tried = attempts(plan.folder, launch)
    noted = sum(attempt["seconds"] for attempt in tried)
    numeric = isinstance(point.value, int | float)
    return {
        "experiment": plan.experiment.name,
        "point": point.name,
        "axis_value": float(point.value) if numeric else None,
        "variant": point.variant,
        "family": point.family,
        "seed": launch.seed,
        "learning_rate": launch.rate,
        "used": used,
        "held_out_loss": held_out_loss(losses),
        "held_out_targets": losses["held_out_loss"]["targets"],
        **_seen_columns(by_seen),
        "tokens": tokens,
        "P_tot": budget.total,
        "P_act": budget.active,
        "P_sparse": budget.sparse,
        "flops_per_token": budget.flops,
        "rho": budget.rho,
        "rows": size[0],
        "lookups_per_token": size[1],
        "tokens_per_row": tokens / size[0] if size[0] else None,
        "lookups_per_row": tokens * size[1] / size[0] if size[0] else None,
        "mismatch_total": off["total"],
        "mismatch_active": off["active"],
        "mismatch_flops": off["flops"],
        "training_seconds": sum(x["training_seconds"] for x in account),
        "seconds": max(noted, sum(x["seconds"] for x in account)),
        "cpu_seconds": sum((attempt.get("cpu_seconds", 0.0) for attempt in tried), 0.0),
        "started": launches[0]["time"],
        "machine": _machine(last),
        "versions": json.dumps({k: v for k, v in last["versions"].items() if v}),
        "commit": _commit(last),
        "text_digest": losses["data"]["digest"],
        "command": _command(last),
    }


def _seen_columns(
    by_seen: Mapping[int, tuple[float | None, float | None]],
) -> dict[str, float | None]:
    """seen_loss_2, unseen_loss_2, ...: the same columns whatever a run searched."""
    found: dict[str, float | None] = {}
    for order in ORDERS:
        seen, unseen = by_seen.get(order, (None, None))
        found |= {f"seen_loss_{order}": seen, f"unseen_loss_{order}": unseen}
    return found


def table_size(config: Config) -> tuple[int, int]:
    """Rows of all tables, and how many of them a token looks up."""
    layers, keys = table_geometry(config), config.model.product_keys
    rows = sum(layer.rows for layer in layers.values()) + len(keys.layers) * keys.rows
    read = len(keys.layers) * keys.heads * keys.top_k
    return rows, len(layers) * config.model.engram.heads + read


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """Write results.csv and results.parquet; the columns are those of the rows."""
    import pyarrow
    from pyarrow import parquet

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / "results.csv") as file:
        file.write(text.getvalue().encode())
    with replacing(folder / "results.parquet") as file:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def _machine(launch: Mapping[str, Any]) -> str:
    """What it ran on: "2 CPUs (AMD EPYC)", "4 x NVIDIA H200"."""
    devices = launch["devices"]
    if devices["platform"] == "cpu":
        return f"{launch['cpus']} CPUs ({launch.get('cpu', 'unknown')})"
    return f"{devices['count']} x {devices['kind']}"


def _command(launch: Mapping[str, Any]) -> str:
    """The command with the interpreter's name alone: where it lies is the machine's business."""
    first, *rest = shlex.split(launch["command"])
    name = Path(first).name
    return shlex.join(["python" if name.startswith("python") else first, *rest])


def _commit(launch: Mapping[str, Any]) -> str:
    git = launch.get("git")
    return "unknown" if not git else git["commit"] + (" with changes" if git["dirty"] else "")
