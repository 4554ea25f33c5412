"""What the evaluation-time neighbours of a checkpoint share: which text they may use, on which
documents their settings are chosen, and the form of their results.

A neighbour adds the training text to a trained model without training: kNN-LM (knn_lm.py) and RAG
(rag.py). Its text is that of the training split, by default the sequences that the run was trained
on, so that it has read what the model has read.

Its settings are chosen on one half of the held-out documents and its loss is told on the other:
documents with even numbers tune, those with odd numbers are scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.checkpoint.workdir import check_writable, file_of_step
from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.config.extras import require
from engram_jax.data.long_documents import Sequences
from engram_jax.data.pipeline import trained_sequences
from engram_jax.data.run_data import RunData
from engram_jax.evaluation.held_out import Checkpoint, check_held_out, open_checkpoint
from engram_jax.evaluation.target_losses import documents_of, target_positions
from engram_jax.hardware.memory import machine_bytes
from engram_jax.hardware.storage import write_text
from engram_jax.monitoring.metrics import json_value

TRAINED, ALL = "trained", "all"
TEXTS = (TRAINED, ALL)
FLAT, IVF = "flat", "ivf"  # kNN-LM's indexes: exact search, or an inverted file


@dataclass(frozen=True)
class Measured:
    """A way to predict the held-out targets, a row of the result.

    nats: float64 [targets], in order. bytes: what it keeps beside the model. seconds_per_token: of
    a target, everything included.
    """

    method: str
    nats: np.ndarray
    bytes: int
    seconds_per_token: float


def open_neighbours(config: Config, workdir: Path, step: str, what: str) -> Checkpoint:
    """The run's checkpoint, with its own settings and text.

    what: the flag, in errors. Raises UserError, before anything is read, on several processes,
    without the extra `lab` or without a folder to write to; and as `open_checkpoint`.
    """
    if jax.process_count() > 1:
        raise UserError(f"{what}: runs in one process, not in {jax.process_count()}")
    if config.serve.ema:
        raise UserError(f"config.serve.ema = True: not for {what}; leave it out")
    if config.serve.off_layers or config.serve.off_orders:
        raise UserError(f"config.serve.off_layers and off_orders: not for {what}; leave them out")
    require("lab", what)
    check_writable(workdir)
    found = open_checkpoint(config, workdir, step)
    check_held_out(found.data)
    if found.data.prepared.store_valid.documents < 2:
        raise UserError(
            f"{what}: the held-out text is 1 document; two are needed, to choose settings on one"
            " and score the other (config.data.validation_fraction)"
        )
    return found


def text_sequences(data: RunData, text: str, step: int) -> tuple[Sequences, np.ndarray]:
    """The training sequences, and the numbers of those that a neighbour may use, int64 ascending.

    text: TRAINED, those of the first `step` batches, or ALL.
    """
    sequences, numbers = trained_sequences(data.prepared, data.config, step)
    return sequences, (np.arange(len(sequences)) if text == ALL else numbers)


def tunes(data: RunData) -> np.ndarray:
    """Which targets the settings are chosen on, bool [targets]; the others are scored."""
    store = data.prepared.store_valid
    return documents_of(store, target_positions(store)) % 2 == 0


def check_halves(tuned: np.ndarray, what: str) -> None:
    """Raises UserError unless both halves have a target."""
    if tuned.all() or not tuned.any():
        raise UserError(
            f"{what}: every predicted token of the held-out text is in documents of one half; give"
            " more text, or set config.data.validation_fraction higher"
        )


def check_memory(needed: float, what: str) -> None:
    """Raises UserError for more bytes than the machine has: trying may hang it."""
    there = machine_bytes()
    if needed > there:
        raise UserError(f"{what} takes {needed / 1e9:,.1f} GB, this machine has {there / 1e9:,.1f}")


def record(
    name: str,
    found: Checkpoint,
    settings: dict[str, Any],
    tuned: np.ndarray,
    methods: Sequence[Measured],
) -> dict[str, Any]:
    """The result: what was measured, a row per method, as JSON values.

    A row: method, loss and targets (the scored half), tuning_loss and tuning_targets, bytes,
    seconds_per_token.
    """
    rows = [
        {
            "method": each.method,
            "loss": float(each.nats[~tuned].mean()),
            "targets": int((~tuned).sum()),
            "tuning_loss": float(each.nats[tuned].mean()),
            "tuning_targets": int(tuned.sum()),
            "bytes": each.bytes,
            "seconds_per_token": each.seconds_per_token,
        }
        for each in methods
    ]
    return {
        "neighbours": name,
        "name": found.data.config.name,
        "step": found.step,
        "split": "held-out documents with even numbers tune, those with odd numbers are scored",
        "settings": settings,
        "rows": rows,
    }


def write_record(workdir: Path, result: dict[str, Any]) -> Path:
    """Write a result as `workdir`/neighbours_NAME.json; returns the file.

    NAME is followed by _INDEX for another index than exact search, and by _STEP for another
    checkpoint than the newest (`file_of_step`).
    """
    index = result["settings"].get("index", FLAT)
    name = result["neighbours"] + ("" if index == FLAT else f"_{index}")
    file = file_of_step(workdir, f"neighbours_{name}.json", result["step"])
    write_text(file, json.dumps(json_value(result), indent=1, allow_nan=False) + "\n")
    return file


def table(result: dict[str, Any]) -> str:
    """A result as text for a terminal."""
    rows = result["rows"]
    width = max(len(row["method"]) for row in rows) + 2
    lines = [f"{'':{width}}{'loss':>8}{'tuning half':>13}{'bytes':>16}{'ms per token':>14}"]
    for row in rows:
        lines.append(
            f"{row['method']:{width}}{_loss(row['loss']):>8}{_loss(row['tuning_loss']):>13}"
            f"{row['bytes']:>16,}{1000 * row['seconds_per_token']:>14.3f}"
        )
    first = rows[0]
    lines.append(
        f"nats per token over {first['targets']:,} tokens; settings chosen on another"
        f" {first['tuning_targets']:,} ({result['split']})"
    )
    lines += [f"{key:24}{value}" for key, value in result["settings"].items()]
    return "\n".join(lines)


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else str(loss)
