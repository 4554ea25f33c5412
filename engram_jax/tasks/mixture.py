"""The configured tasks together: their documents at a share of the text, and their items."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from engram_jax.config import TasksConfig
from engram_jax.tasks import arithmetic, facts, in_context
from engram_jax.tasks.drawing import Item

FACTS, ARITHMETIC = "facts", "arithmetic"
# Increase it when the same configuration would give other documents or items.
FORMAT = 2
# Of the answers of a task, those that natural text happens to have are left out; so more are drawn.
_SPARE = 2


class Mixture:
    """What config.data.tasks asks for, beside `text_bytes` bytes of text.

    share: of all bytes of the mixed text, tasks included. Every task and difficulty gets an equal
    part. Raises UserError where the part of the facts is too small.
    """

    def __init__(self, config: TasksConfig, text_bytes: int) -> None:
        self.config = config
        self.bytes = round(text_bytes * config.share / (1 - config.share))
        self._parts = list(itertools.product(config.names, config.difficulties))
        self._facts: dict[str, facts.Facts] = {}
        if FACTS in config.names:
            each = self.bytes // len(self._parts)
            count = facts.count_affordable(each, config.frequencies)
            for difficulty in config.difficulties:
                made = facts.Facts(difficulty, config.seed, config.frequencies, count)
                self._facts[difficulty] = made

    def documents(self) -> Iterator[str]:
        """The documents in the order in which they stand in an epoch: the task that is furthest
        behind its part is next."""
        parts = [self._documents(name, difficulty) for name, difficulty in self._parts]
        wanted = self.bytes / len(parts)
        written = [0] * len(parts)
        while min(written) < wanted:
            i = written.index(min(written))
            document = next(parts[i], None)
            if document is None:  # all facts are stated
                written[i] = self.bytes
                continue
            written[i] += len(document.encode())
            yield document
        for (name, _), part in zip(self._parts, parts, strict=True):
            if name == FACTS:
                yield from part  # its size was estimated, and every statement belongs to the epoch

    def _documents(self, name: str, difficulty: str) -> Iterator[str]:
        if name == FACTS:
            return iter(self._facts[difficulty].documents())
        if name == ARITHMETIC:
            return arithmetic.documents(difficulty, self.config.seed)
        return in_context.documents(name, difficulty, self.config.seed)

    @property
    def identity(self) -> list[Any]:
        """JSON values that decide documents and items, beside the text."""
        return [FORMAT, dataclasses.asdict(self.config)]

    def items(self) -> list[Item]:
        """More items than are wanted, all with different prompts; `unseen` chooses among them."""
        found: list[Item] = []
        wanted = self.config.test_items * _SPARE
        for name, difficulty in self._parts:
            if name == FACTS:
                found += self._facts[difficulty].items(self.config.test_items)
                continue
            endless = (
                arithmetic.items(difficulty, self.config.seed)
                if name == ARITHMETIC
                else in_context.items(name, difficulty, self.config.seed)
            )
            different: dict[str, Item] = {}
            for item in itertools.islice(endless, 4 * wanted):
                different.setdefault(item.prompt, item)
            found += list(different.values())[:wanted]
        return found


def interleave(
    texts: Iterable[str], text_bytes: int, mixture: Mixture
) -> Iterator[tuple[str, bool]]:
    """(document, whether it is a task's): the tasks' evenly among the texts', by bytes."""
    tasks, read, written = mixture.documents(), 0, 0
    for text in texts:
        yield text, False
        read += len(text.encode())
        while written * text_bytes < read * mixture.bytes:
            document = next(tasks, None)
            if document is None:
                break
            written += len(document.encode())
            yield document, True
    for document in tasks:
        yield document, True


class Unseen:
    """Leaves out items whose answer stands in the text: `read` all documents of it, then `keep`.

    The tasks' own documents have no answer of a test item (tasks/drawing.py). Facts are kept, which
    are trained on, and arithmetic, whose operands are new: its answers are plain numbers.
    """

    _ROW = re.compile(r"(?<!\S)(?:[A-Za-z] )+[A-Za-z]")
    _NUMBER = re.compile(r"(?<!\d)\d{7}(?!\d)")
    _NAMES = re.compile(r"(?<![A-Z])[A-Z]{5}(?: [A-Z]{5})+")

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = list(items)
        self._answers = {item.answer.strip() for item in self._items if _is_new(item)}
        self._lengths = sorted({len(answer) for answer in self._answers})
        self._seen: set[str] = set()

    def read(self, text: str) -> None:
        """Look for the answers in a document."""
        for run in self._ROW.findall(text):
            for length in self._lengths:
                parts = {run[i : i + length] for i in range(0, len(run) - length + 1, 2)}
                self._seen |= parts & self._answers
        self._seen.update(self._answers.intersection(self._NUMBER.findall(text)))
        for run in self._NAMES.findall(text):
            self._seen.update(answer for answer in self._answers if answer in run)

    def keep(self, limit: int) -> list[Item]:
        """At most `limit` items of each task, difficulty and frequency, in their order."""
        kept: list[Item] = []
        count: Counter[tuple[str, str, int]] = Counter()
        for item in self._items:
            group = (item.task, item.difficulty, item.frequency)
            if count[group] == limit or (_is_new(item) and item.answer.strip() in self._seen):
                continue
            count[group] += 1
            kept.append(item)
        return kept


def _is_new(item: Item) -> bool:
    """Whether the answer must not stand in any text."""
    return item.task not in (FACTS, ARITHMETIC)
