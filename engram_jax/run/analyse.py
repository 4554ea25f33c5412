"""--mode=analyse: looks inside a checkpoint, and writes what it finds as a page and as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.workdir import check_writable, file_of_step
from engram_jax.config import Config
from engram_jax.config.given_files import check_output
from engram_jax.distributed import processes
from engram_jax.hardware.storage import write_text
from engram_jax.monitoring.metrics import json_value
from engram_jax.report.analysis_page import write_page
from engram_jax.run import analyses, row_analysis
from engram_jax.run.analysis_inputs import (
    CKA,
    GATES,
    LENS,
    ROWS,
    SENSITIVITY,
    USAGE,
    WHAT,
    Given,
    NothingToAnalyseError,
    Settings,
    check_settings,
    open_given,
)

PAGE = "analysis.html"
_ANALYSES = {
    LENS: analyses.lens,
    CKA: analyses.cka,
    SENSITIVITY: analyses.sensitivity,
    GATES: analyses.gates,
    USAGE: analyses.usage,
    ROWS: row_analysis.rows,
}


def analyse(config: Config, workdir: Path, step: str, settings: Settings) -> dict[str, Any]:
    """Analyse a checkpoint ("latest", "best" or a step); returns what is in the JSON that is
    written: a part for each analysis, "left_out", those that the text has nothing for, and "page",
    the path of the page.

    Raises UserError for settings that do not fit together or the model, in several processes, and
    as `load_model`.
    """
    what = check_settings(config, settings)
    page = settings.output
    if page is None:
        check_writable(workdir)
    else:
        check_output("output", page)
        check_output("output", page.with_suffix(".json"))
    tell = processes.stages(sys.stderr)
    given = open_given(config, workdir, step, settings, what, tell)
    page = page or file_of_step(workdir, PAGE, given.model.loaded.step)
    record = record_of(given)
    for name in what:
        tell(WHAT[name])
        with _timed(record, name):
            try:
                record[name] = _ANALYSES[name](given)
            except NothingToAnalyseError as error:
                if settings.what or settings.entities:
                    raise
                record["left_out"][name] = str(error)
    tell("writing the page")
    record["page"] = str(page)
    write_page(page, record)
    text = json.dumps(json_value(record), indent=1, allow_nan=False)
    write_text(page.with_suffix(".json"), text + "\n")
    return record


def record_of(given: Given) -> dict[str, Any]:
    """What is analysed, as JSON values."""
    loaded, data = given.model.loaded, given.model.program.config.data
    record: dict[str, Any] = {
        "name": loaded.program.config.name,
        "run": loaded.run,
        "step": loaded.step,
        "checkpoint": loaded.digest[:16],
        "batches": {"sequences": data.batch_size, "tokens": data.seq_len},
        "trained_tokens": loaded.seq_len,
        "seconds": {},
        "left_out": {},
    }
    if given.other is not None:
        other = given.other.loaded
        record["against"] = {
            "name": other.program.config.name,
            "run": other.run,
            "step": other.step,
            "checkpoint": other.digest[:16],
            "same_text": other.trained_on == loaded.trained_on,
        }
    return record


@contextmanager
def _timed(record: dict[str, Any], name: str) -> Iterator[None]:
    wall, processor = time.monotonic(), time.process_time()
    yield
    record["seconds"][name] = {
        "wall": round(time.monotonic() - wall, 2),
        "processor": round(time.process_time() - processor, 2),
    }


def summary(record: dict[str, Any]) -> str:
    """The result as lines for a terminal; the page has the rest."""
    lines = []
    for model in record.get("lens", {}).get("models", []):
        kl = " ".join(f"{x:.3f}" for x in model["kl"])
        lines.append(f"KL by layer, {model['run']}: {kl}")
    if found := record.get("cka"):
        lines.append(f"CKA at {found['entity_tokens']:,} ends of entities")
        if found["soft_alignment"] is not None:
            aligned = " ".join(f"{x:.1f}" for x in found["soft_alignment"])
            lines.append(f"layers of {found['second']} are like {found['first']}'s: {aligned}")
    if found := record.get("sensitivity"):
        lines.append(f"loss {found['loss']:.4f} over {found['targets']:,} targets, rises by")
        whole = [part for part in found["parts"] if "head" not in part["part"]]
        lines += [f"  {part['rise']:+.4f} without {part['part']}" for part in whole]
    for layer, orders in record.get("usage", {}).get("layers", {}).items():
        for order, used in orders.items():
            dead = sum(x["rows"] - x["touched"] for x in used["heads"])
            rows = sum(x["rows"] for x in used["heads"])
            lines.append(
                f"layer {layer}, {order}-grams: {used['ngrams']:,} different ones, {dead:,} of"
                f" {rows:,} rows never read"
            )
    lines += [f"{name} is left out: {why}" for name, why in record["left_out"].items()]
    return "\n".join([*lines, f"page: {record['page']}"])
