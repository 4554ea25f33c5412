"""Texts given by name: NAME=PATH on the command line, NAME=PATH@STEPS in train.evaluations."""

from __future__ import annotations

import re
from typing import NamedTuple

NAMED = "NAME=PATH, the name of letters, digits, '.', '_', '+' and '-'"
_NAME = re.compile(r"\w[\w.+-]*")


class NamedPath(NamedTuple):
    """every: steps between two evaluations, 0 = not given."""

    name: str
    path: str
    every: int = 0


def named_path(text: str) -> NamedPath | None:
    """NAME=PATH, or None if it is not that."""
    name, _, path = text.partition("=")
    return NamedPath(name, path) if _NAME.fullmatch(name) and path.strip() else None


def evaluated_path(text: str) -> NamedPath | None:
    """NAME=PATH or NAME=PATH@STEPS, or None if it is neither. An @ without digits behind it is of
    the path."""
    path, at, every = text.rpartition("@")
    if not at or not every.isdecimal():
        return named_path(text)
    found = named_path(path)
    return None if found is None or int(every) < 1 else found._replace(every=int(every))
