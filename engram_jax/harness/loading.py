"""Finds and loads lm-eval's tasks: what cannot be loaded is a line each, and the others go on.

A task's data set comes from the cache of the package `datasets`, or from the hub where there is a
network; RULER's are made here (harness/ruler.py). Tasks that run code which the model wrote are
left alone unless the user allows it: some run a first program while they are loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase
from lm_eval.tasks import TaskManager

from engram_jax.config.errors import UserError, did_you_mean, shown
from engram_jax.config.keys import nearest
from engram_jax.distributed.consensus import error_line
from engram_jax.harness import ruler
from engram_jax.harness.code_metric import CodeEval
from engram_jax.harness.paper import BENCHMARKS, PAPER
from engram_jax.harness.ruler import RulerAsked

CONSENT = "--confirm_run_unsafe_code"


@dataclass(frozen=True)
class Asked:
    """What the user asks for.

    tasks: names of tasks, groups and tags, or PAPER alone. shots: for all tasks that do not fix
    theirs to none; None = each one's own. include: a folder with tasks of the user's. unsafe: run
    code that the model wrote. limit: of a task's documents, a count or a share below 1; None = all.
    ruler: for RULER's tasks.
    """

    tasks: tuple[str, ...]
    shots: int | None = None
    include: Path | None = None
    unsafe: bool = False
    limit: float | None = None
    ruler: RulerAsked = field(default_factory=RulerAsked)


@dataclass(frozen=True)
class Loaded:
    """A name that can be run. items: lm-eval's tasks or groups. shots, limit: as in `Asked`.
    manager: what loaded them; lm-eval reads all of its files again without it. about: what the
    results say of RULER's prompts."""

    name: str
    items: list[Any]
    shots: int | None
    manager: TaskManager
    limit: float | None = None
    about: dict[str, Any] = field(default_factory=dict)


def load_tasks(
    asked: Asked,
    reads: Callable[[], ruler.Reads] | None = None,
    warn: Callable[[str], None] = lambda line: None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[list[Loaded], dict[str, str]]:
    """(what can be run, what cannot: name -> why, in a line).

    reads: how the model reads, for RULER's tasks. warn, tell: are given lines for the user.

    Raises UserError for a name that lm-eval does not know, and for lengths, examples and a folder
    that RULER's tasks cannot have.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted = _wanted(asked)
    names = [name for tasks, _ in wanted.values() for name in tasks]
    manager = _manager(asked.include, names)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(found if (found := _similar(name, manager)) else [])
            where = "" if asked.include is None else f", nor of {shown(asked.include)}"
            raise UserError(
                f"--tasks={shown(name)}: no task of lm-eval{where}; {hint or _SEE}".rstrip("; ")
            )
    loaded: list[Loaded] = []
    missing: dict[str, str] = {}
    of_ruler = _of_ruler(manager, names, asked)
    if of_ruler:
        assert reads is not None
        reading = reads()
        by_task = {str(leaf["task"]): leaf for leaves in of_ruler.values() for leaf in leaves}
        built = ruler.build([*by_task.values()], asked.ruler, reading, asked.limit, tell)
        for name, leaves in of_ruler.items():
            items = ruler.load(manager, name, leaves, built, reading, warn)
            about = built.about([str(leaf["task"]) for leaf in leaves])
            if items:
                loaded.append(Loaded(name, items, None, manager, about=about))
        missing |= built.errors
    for title, (tasks, shots) in wanted.items():
        if not tasks:
            missing[title] = "lm-eval has no such task"
        for name in tasks:
            if name in of_ruler:
                continue
            label = name if title == name else f"{title} ({name})"
            try:
                items = _load(manager, name, asked.unsafe)
                loaded.append(Loaded(name, items, shots, manager, asked.limit))
            except Exception as error:  # a data set, a package, the network: whatever it needs
                missing[label] = _reason(manager, name, error)
    return loaded, missing


_SEE = "`lm-eval ls tasks` lists them"


def _wanted(asked: Asked) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Title -> tasks, shots."""
    if PAPER not in asked.tasks:
        return {name: ((name,), asked.shots) for name in asked.tasks}
    if asked.tasks != (PAPER,):
        raise UserError(f"--tasks={','.join(asked.tasks)}: {PAPER} stands alone")
    if asked.shots is not None:
        raise UserError(f"--num_fewshot: not with --tasks={PAPER}, which has the paper's shots")
    return {b.name: (b.tasks, None if b.own else b.shots) for b in BENCHMARKS}


def _of_ruler(
    manager: TaskManager, names: Sequence[str], asked: Asked
) -> dict[str, list[dict[str, Any]]]:
    """The names that stand for tasks of RULER, and these."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        leaves = [*configs_of(manager.task_index, name)]
        own = [leaf for leaf in leaves if leaf and ruler.is_ruler(leaf)]
        if own and len(own) < len(leaves):
            raise UserError(
                f"--tasks={shown(name)}: has tasks of RULER and others; name them apart"
            )
        if own:
            found[name] = own
    if found and asked.shots:
        raise UserError(f"--num_fewshot={asked.shots}: RULER's tasks have no examples; must be 0")
    for flag, value in (("lengths", asked.ruler.lengths), ("data", asked.ruler.data)):
        if value and not found:
            raise UserError(f"--ruler_{flag}: only with tasks of RULER, for example --tasks=ruler")
    return found


def _manager(include: Path | None, names: Sequence[str]) -> TaskManager:
    """With all of lm-eval's own tasks only if others than RULER's are asked for: reading their
    thousands of files takes some 15 seconds."""
    if include is not None and not os.path.isdir(include):
        raise UserError(f"--include_path={shown(include)}: no such folder")
    folders = [] if include is None else [str(include)]
    few = TaskManager(include_path=[str(ruler.TASKS), *folders], include_defaults=False)
    if all(name in few.all_tasks for name in names) and not _points_outside(few, names):
        return few
    return TaskManager(include_path=folders or None)


def _points_outside(manager: TaskManager, names: Sequence[str]) -> bool:
    return any(leaf is None for name in names for leaf in configs_of(manager.task_index, name))


def configs_of(
    index: Mapping[str, Any], name: str, over: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any] | None]:
    """The configurations of the tasks that a name stands for, as they are in their files, with what
    their groups set; None for one that is not in the index."""
    over = over or {}
    entry = index.get(name)
    if entry is None:
        yield None
        return
    children = (entry.cfg or {}).get("task")
    if entry.kind.name == "TAG":
        for child in sorted(entry.tags):
            yield from configs_of(index, child, over)
    elif entry.kind.name == "GROUP" and isinstance(children, list):
        for child in children:
            own = child if isinstance(child, dict) else {}
            below = own.get("task", own.get("group")) if own else child
            if isinstance(below, list):  # a group that stands in its parent's file
                for one in below:
                    yield from configs_of(index, one, {**over, **own})
            else:
                yield from configs_of(index, str(below), {**over, **own})
    else:
        kept = {key: value for key, value in over.items() if key not in ("task", "group")}
        yield {**(entry.cfg or {}), **kept}


def _load(manager: TaskManager, name: str, unsafe: bool) -> list[Any]:
    configs = [config for config in configs_of(manager.task_index, name) if config]
    if not unsafe and any(config.get("unsafe_code") for config in configs):
        raise UserError(f"runs code that the model writes; {CONSENT} allows it")
    with _local_metrics():
        found = manager.load([name])
    top = found.get("groups", {}).get(name)
    return list(found["tasks"].values()) if top is None else [top]


@contextlib.contextmanager
def _local_metrics() -> Iterator[None]:
    """`evaluate.load("code_eval")` is a download elsewhere; here it is harness/code_metric.py."""
    before = evaluate.load

    def load(path: str, *rest: Any, **more: Any) -> Any:
        return CodeEval() if path == "code_eval" else before(path, *rest, **more)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = before


def _reason(manager: TaskManager, name: str, error: Exception) -> str:
    """Why a task cannot be loaded, in a line; of a missing data set, where it would be."""
    line = " ".join(error_line(error).split())
    if isinstance(error, UserError):
        return line
    sets = {
        str(config["dataset_path"]): str(config.get("dataset_name") or "")
        for config in configs_of(manager.task_index, name)
        if config and config.get("dataset_path")
    }
    about = next((path for path in sets if path in line or path.split("/")[-1] in line), "")
    local = about in ("json", "csv", "parquet", "text", "arrow")
    if not about or local:
        return shown(line, quoted=False)
    *owner, own = about.split("/")
    place = "___".join([*owner, camelcase_to_snakecase(own)])  # as `datasets` names it
    folder = Path(datasets_config.HF_DATASETS_CACHE) / place
    return (
        f"its data set {about} is not here: where there is a network, the same command fetches it;"
        f" it would be in {folder} ({shown(line, quoted=False, most=120)})"
    )


def _similar(name: str, manager: TaskManager) -> list[str]:
    return [found] if (found := nearest(name, manager.all_tasks)) else []
