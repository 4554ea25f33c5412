"""Synthetic tasks (engram_jax/tasks/) among the training documents of a prepared text.

Beside the token store lie tasks.json, the test items, and tasks.npy, which documents are tasks'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import load_array, read_json
from engram_jax.data.corpus import Corpus
from engram_jax.data.source_report import SourceReport
from engram_jax.data.token_store import TokenStore
from engram_jax.hardware.storage import replacing, write_text
from engram_jax.tasks.drawing import Item
from engram_jax.tasks.mixture import Mixture, Unseen, interleave

ITEMS, FROM_TASKS = "tasks.json", "tasks.npy"


def mixture_of(config: DataConfig, report: SourceReport) -> Mixture | None:
    """The tasks for a text of this report, None if none are configured. Raises UserError as
    `Mixture`."""
    if not config.tasks.names:
        return None
    return Mixture(config.tasks, report.train_bytes)


def mix(texts: Iterator[str], corpus: Corpus, mixture: Mixture, folder: Path) -> Iterator[str]:
    """`texts`, the training documents, with the tasks' among them; at its end the files are
    written. Answers are looked for in the held-out text, too."""
    unseen = Unseen(mixture.items())
    from_tasks: list[bool] = []
    for text, of_task in interleave(texts, corpus.report.train_bytes, mixture):
        from_tasks.append(of_task)
        if not of_task:
            unseen.read(text)
        yield text
    for text in corpus.documents("validation"):
        unseen.read(text)
    items = unseen.keep(mixture.config.test_items)
    with replacing(folder / FROM_TASKS, shared=False) as file:
        np.save(file, np.asarray(from_tasks, bool))
    write_text(folder / ITEMS, json.dumps([dataclasses.asdict(item) for item in items]))


@dataclass(frozen=True)
class TaskItems:
    """Test items, and the tokens of an epoch of the training text that has their tasks."""

    items: list[Item]
    train_tokens: int


def read_items(path: Path) -> TaskItems:
    """What `MixedTasks.stored` gave. Raises UserError if there is no such file."""
    if not path.exists():
        raise UserError(
            f"--workdir={shown(path.parent)}: no {path.name} there: its run was trained without"
            " config.data.tasks"
        )
    stored = read_json(path)
    tokens = stored.get("train_tokens")
    if type(tokens) is not int or tokens < 1:
        raise UserError(f'{shown(path)}: lacks "train_tokens"; it is damaged')
    return TaskItems(_items(stored.get("items"), path), tokens)


def _items(stored: Any, path: Path) -> list[Item]:
    """Raises UserError for what is no list of items."""
    try:
        return [Item(**{**item, "distractors": tuple(item["distractors"])}) for item in stored]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{shown(path)}: holds no items of tasks; it is damaged") from error


@dataclass(frozen=True)
class MixedTasks:
    """What was mixed into the training tokens of a folder."""

    folder: Path
    train: TokenStore

    @cached_property
    def items(self) -> list[Item]:
        """The test items."""
        path = self.folder / ITEMS
        return _items(read_json(path, kind=list), path)

    @property
    def for_scoring(self) -> TaskItems:
        return TaskItems(self.items, len(self.train))

    def stored(self) -> str:
        """The items as JSON text, for a run's folder."""
        items = [dataclasses.asdict(item) for item in self.items]
        return json.dumps({"train_tokens": len(self.train), "items": items}) + "\n"

    @cached_property
    def tokens(self) -> int:
        """Training tokens of the tasks, ends of documents counted."""
        sizes = np.diff(self.train.starts)
        return int(sizes[load_array(self.folder / FROM_TASKS)].sum())

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {"task_tokens": self.tokens, "task_items": len(self.items)}

    def log(self, log: Callable[[str], Any]) -> None:
        share = self.tokens / len(self.train)
        log(
            f"data: {self.tokens:,} of the training tokens ({share:.1%}) are of synthetic tasks;"
            f" {len(self.items):,} test items"
        )
