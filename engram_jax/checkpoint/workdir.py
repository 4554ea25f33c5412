"""The run's folder: what is in it, whether it is writable, the lock against a second trainer.

run.json                     every launch (checkpoint/run_record.py)
metrics.jsonl, report.html   what happened (monitoring/metrics.py, report/write.py)
tensorboard/, wandb/, mlflow/   the same for others (monitoring/loggers.py)
held_out_documents.npz       losses by document (evaluation/target_losses.py)
goodput.json, profile/       the time it took (monitoring/goodput.py, monitoring/profiling.py)
checkpoints/, addressing/    the model (checkpoint/manager.py, addressing/artifact.py)
tokenizer.json, text.json    its tokenizer (checkpoint/run_tokenizer.py)
task_items.json, task_scores.json   of synthetic tasks (data/mixed_tasks.py, evaluation/tasks.py)
neighbours_NAME.json         of neighbours (evaluation/neighbours.py)
analysis.html, analysis.json, analysis/   of --mode=analyse (run/analyse.py)
evaluations/STEP/            of named texts, LongPPL and benchmarks (checkpoint/results.py)
.lock                        held while a process trains here
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import check_folder
from engram_jax.distributed.consensus import agree

RUN, TOKENIZER, CHECKPOINTS = "run.json", "tokenizer.json", "checkpoints"
TEXT, LOSSES = "text.json", "losses.json"
HELD_OUT_DOCUMENTS = "held_out_documents.npz"
TASK_ITEMS, TASK_SCORES = "task_items.json", "task_scores.json"
# What a run writes: told before hours of work if something else stands there.
FILES = (
    *(RUN, TOKENIZER, TEXT, LOSSES, HELD_OUT_DOCUMENTS, TASK_ITEMS, TASK_SCORES, ".lock"),
    *("metrics.jsonl", "goodput.json", "tokenizer_config.json", "report.md", "report.html"),
)
FOLDERS = (CHECKPOINTS, "addressing", "tensorboard", "wandb", "mlflow", "profile", "report")
LOGS = (
    *("metrics.jsonl", "tensorboard", "goodput.json"),
    *("wandb_run_id.txt", "mlflow_run_id.txt"),  # monitoring/loggers.py
)


def check_writable(workdir: Path) -> None:
    """Raises UserError if `workdir` is not, and cannot become, a folder to write to.

    Makes nothing, so that what is refused later leaves no empty folder behind.
    """
    try:
        check_folder(workdir)
    except NotADirectoryError as error:
        where = shown(error.filename)
        raise UserError(f"--workdir={shown(workdir)}: {where} is not a folder") from error
    except OSError as error:
        folder = next(f for f in (workdir, *workdir.absolute().parents) if os.path.lexists(f))
        reason = f"{shown(folder)} cannot be written to ({error.strerror})"
        raise UserError(f"--workdir={shown(workdir)}: {reason}") from error
    for name in FILES:
        if os.path.lexists(workdir / name) and not os.path.isfile(workdir / name):
            raise UserError(f"--workdir={shown(workdir)}: {name} there is no file; move it away")
    for name in FOLDERS:
        if os.path.lexists(workdir / name) and not os.path.isdir(workdir / name):
            raise UserError(f"--workdir={shown(workdir)}: {name} there is no folder; move it away")


def check_trained(workdir: Path) -> None:
    """Raises UserError if no run was ever started in `workdir`."""
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(f"--workdir={workdir}: no trained model there; run --mode=train first")


def checkpoint_steps(workdir: Path) -> list[int]:
    """The steps that `workdir` has a checkpoint of, ascending, by the names of their folders."""
    folder = workdir / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def file_of_step(workdir: Path, name: str, step: int) -> Path:
    """Where a result of the checkpoint after `step` is written: of the newest one `workdir`/NAME,
    of another one NAME with _STEP before its ending, so that it overwrites none of the newest."""
    file = workdir / name
    newest = max(checkpoint_steps(workdir), default=step)
    return file if step >= newest else file.with_stem(f"{file.stem}_{step}")


def parse_step(step: str) -> int | str | None:
    """--step as `Checkpointer.restore` takes it: "latest" -> None, "best", or a number. Raises
    UserError for anything else."""
    if step not in ("latest", "best") and not step.isdecimal():
        raise UserError(f"--step={step}: must be latest, best or a step number")
    return int(step) if step.isdecimal() else {"latest": None}.get(step, step)


def parse_checkpoint(text: str, where: str) -> tuple[Path, str]:
    """(workdir, step) of WORKDIR, which is its latest step, or WORKDIR@STEP. where: names flag or
    key, and value. Raises UserError for another STEP."""
    folder, at, step = text.rpartition("@")
    if not at or Path(text).expanduser().is_dir():
        return Path(text).expanduser(), "latest"
    if not folder or (step not in ("latest", "best") and not step.isdecimal()):
        raise UserError(f"{where}: after @ must stand latest, best or a step's number")
    return Path(folder).expanduser(), step


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make `workdir` and keep other launches from training in it meanwhile.

    The lock goes with the process, however that ends. One process of a run holds it; on a file
    system without locks none does. Raises UserError if another launch has it. What fails before the
    run's record (run.json) is written leaves nothing of a folder that was not there.
    """
    made = None if jax.process_count() > 1 else _first_missing(workdir)
    with contextlib.ExitStack() as stack:
        agree(lambda: _lock(workdir, stack))
        try:
            yield
        except BaseException:
            if made is not None and not (workdir / RUN).exists():
                _remove(workdir, made)
            raise


def _first_missing(folder: Path) -> Path | None:
    """The outermost folder that has to be made for `folder`; None if it is there."""
    path, missing = folder.absolute(), None
    while not os.path.lexists(path):
        path, missing = path.parent, path
    return missing


def _remove(workdir: Path, made: Path) -> None:
    """Remove a folder that this launch has made, and those around it up to `made`, if empty."""
    folder = workdir.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        while folder != made:
            folder = folder.parent
            folder.rmdir()


def _lock(workdir: Path, stack: contextlib.ExitStack) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:
        return
    held = try_lock(workdir / ".lock")
    if held is None:
        raise UserError(
            f"--workdir={workdir}: another process is training there; wait for it, or give"
            " another --workdir"
        )
    stack.enter_context(held)


def try_lock(path: Path) -> TextIO | None:
    """The open file `path` (made if missing), locked until it is closed here and in every process
    that has inherited it; None if another has the lock. On a file system without locks, none is
    held."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass
    return file
