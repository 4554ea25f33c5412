"""Keep what a sweep has found beside the code, and take it up again elsewhere.

    python -m scripts.keep_sweep runs/allocation docs/results/allocation
    python -m scripts.keep_sweep --restore docs/results/allocation runs/allocation

The first copies the report, its tables and pictures, and packs what the runs that have ended say of
themselves into runs.tar.xz: their losses by document, scores on the tasks, analyses, settings and
logs of attempts, without checkpoints. The second unpacks that into a sweep's folder: `--mode=sweep
--report_only` makes the report again from it, and `--mode=sweep` goes on with the runs that are not
there.

Commands and folders in the records are kept without where they lay on the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.workdir import HELD_OUT_DOCUMENTS, LOSSES, RUN, TASK_SCORES
from engram_jax.monitoring import goodput

PACKED = "runs.tar.xz"
ANALYSIS = "analysis.json"  # of scripts/look_inside.py
OF_A_RUN = (LOSSES, RUN, HELD_OUT_DOCUMENTS, TASK_SCORES, ANALYSIS, goodput.FILE)
SHOWN = ("report.html", "report.md", "results.csv", "results.parquet", "*.png", "*.svg")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("source", type=Path)
    arguments.add_argument("target", type=Path)
    arguments.add_argument(
        "--restore", action="store_true", help="from the kept to a sweep's folder"
    )
    given = arguments.parse_args()
    if given.restore:
        restore(given.source, given.target)
    else:
        keep(given.source, given.target)


def keep(sweep: Path, kept: Path) -> None:
    """Ends the program where nothing has ended in the sweep's folder."""
    ended = {path.parent.name for path in sweep.glob(f"*/{LOSSES}")}
    ended |= {path.stem for path in sweep.glob("logs/*.json") if _diverged(path)}
    if not ended:
        sys.exit(f"error: {sweep}: no run in it has ended")
    kept.mkdir(parents=True, exist_ok=True)
    for path in (path for pattern in SHOWN for path in sweep.glob(pattern)):
        shutil.copyfile(path, kept / path.name)
    files = [sweep / run / name for run in sorted(ended) for name in OF_A_RUN]
    files += sorted(sweep.glob("logs/*.json"))
    with tarfile.open(kept / PACKED, "w:xz") as archive:
        for path in filter(Path.exists, files):
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.dumps(_without_places(json.loads(content))).encode()
            entry = tarfile.TarInfo(path.relative_to(sweep).as_posix())
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    print(f"{kept}: {len(ended)} runs, {sum(f.stat().st_size for f in kept.iterdir()):,} bytes")


def restore(kept: Path, sweep: Path) -> None:
    """Existing files of the sweep's folder stay."""
    with tarfile.open(kept / PACKED) as archive:
        new = [entry for entry in archive if not (sweep / entry.name).exists()]
        archive.extractall(sweep, new, filter="data")
    print(f"{sweep}: {len(new)} files")


def _diverged(log: Path) -> bool:
    attempts = json.loads(log.read_text())
    return bool(attempts and attempts[-1].get("diverged"))


def _without_places(record: Any) -> Any:
    """A record without the host's name, the folders the interpreter and the code lay in, and those
    that environment variables name."""
    if isinstance(record, list):
        return [_without_places(item) for item in record]
    if not isinstance(record, dict):
        return record
    found = {key: _without_places(item) for key, item in record.items() if key != "directory"}
    if isinstance(found.get("command"), str):
        first, *rest = shlex.split(found["command"])
        found["command"] = shlex.join([Path(first).name, *rest])
    if isinstance(found.get("environment"), dict):
        found["environment"] = {
            name: Path(value).name if str(value).startswith("/") else value
            for name, value in found["environment"].items()
        }
    return found | ({"host": ""} if "host" in found else {})


if __name__ == "__main__":
    main()
