"""What evaluations of a checkpoint found, kept in its run's folder for `--mode=report`.

    WORKDIR/evaluations/STEP/KIND-KEY.json
    {"kind": ..., "checkpoint": ..., "digest": ..., "step": ..., "time": ..., "asked": {...},
     "result": {...}}

KEY is a hash of what was asked for, so that the same question replaces its answer and others stay.
digest: of the checkpoint. time: seconds since the epoch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import read_json
from engram_jax.data.cache import key_of
from engram_jax.hardware.storage import write_text
from engram_jax.monitoring.metrics import json_value

FOLDER = "evaluations"
TEXTS, LONG_PPL, LM_EVAL = "texts", "long_ppl", "lm_eval"  # kinds


def write_result(
    workdir: Path,
    kind: str,
    model: LoadedModel,
    asked: Mapping[str, Any],
    result: Mapping[str, Any],
) -> Path:
    """Keep a result; of process 0 alone. asked: JSON values that decide it, beside the checkpoint.
    Raises OSError where the folder cannot be written."""
    file = workdir / FOLDER / str(model.step) / f"{kind}-{key_of(asked)[:16]}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": kind,
        "checkpoint": model.name,
        "digest": model.digest,
        "step": model.step,
        "time": time.time(),
        "asked": dict(asked),
        "result": result,
    }
    write_text(file, json.dumps(json_value(record), indent=1, allow_nan=False) + "\n")
    return file


def read_results(workdir: Path, step: int) -> list[dict[str, Any]]:
    """The records of a checkpoint, the oldest first. Raises UserError for a file that is none."""
    found = []
    for file in sorted((workdir / FOLDER / str(step)).glob("*.json")):
        record = read_json(file)
        fields = {"kind": str, "time": float, "asked": dict, "result": dict}
        if any(type(record.get(key)) is not kind for key, kind in fields.items()):
            raise UserError(f"{shown(file)}: is no result of an evaluation; move it away")
        found.append(record)
    return sorted(found, key=lambda record: record["time"])
