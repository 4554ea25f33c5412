"""The installed distributions that this project itself needs to run, and no others."""

from __future__ import annotations

import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "engram_jax"
_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def needed(project: str = PROJECT) -> list[Distribution]:
    """What `project` requires at run time, directly or through others, in the order of names.

    Its own extras (test tools, accelerators) do not count, so installing them, or anything else,
    changes nothing. A requirement that is not installed is passed over.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(text, "") for text in _requirements(project)]
    while waiting:
        text, extra = waiting.pop()  # a requirement of something that was asked for with `extra`
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *sorted(requirement.extras)):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                found[name] = distribution(requirement.name)
            except PackageNotFoundError:
                continue
            waiting += [(inner, wanted) for inner in found[name].requires or ()]
    found.pop(canonicalize_name(project), None)
    return [found[name] for name in sorted(found)]


def _requirements(project: str) -> list[str]:
    """Of the installed metadata, else (run from a clone that is not installed) pyproject.toml's."""
    try:
        return distribution(project).requires or []
    except PackageNotFoundError:
        if not _PYPROJECT.is_file():
            return []
        return tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
