"""Finds the keys whose values differ between two configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from engram_jax.config.parse import to_dict
from engram_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class _Absent:
    """The value of a key that only the other side has."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()


def differences(
    ours: Config | Mapping[str, Any], theirs: Config | Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(dotted key, our value, their value) of every key whose values are not equal.

    It takes configurations or nested mappings, such as those read from a run.json. The order is
    that of `ours`, then keys that only `theirs` has. A key that is missing on one side has the
    value ABSENT. Lists and tuples with equal items are equal, and so are two NaNs; true is not 1.
    """
    mine, other = flat(ours), flat(theirs)
    pairs = ((key, mine.get(key, ABSENT), other.get(key, ABSENT)) for key in {**mine, **other})
    return [pair for pair in pairs if not _equal(*pair[1:])]


def flat(values: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value: {"a": {"b": 1}} is {"a.b": 1}."""
    return dict(_leaves(to_dict(values) if isinstance(values, Config) else values, ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        same_length = len(ours) == len(theirs)
        return same_length and all(_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, bool) != isinstance(theirs, bool):
        return False
    return ours == theirs or (ours != ours and theirs != theirs)
