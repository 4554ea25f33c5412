"""The keys of the configuration as the schema has them: types, meanings, and the nearest known."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from engram_jax.config.schema import Config

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_KEYS = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): ")
_LONGEST = 100  # characters of a name that others are compared with: a long one would take long
_WHOLE = 0.75  # how alike dotted names must be, which share their sections


def section_types(hint: Any) -> dict[str, Any]:
    """Key -> type of a section; {} for the type of a plain value."""
    return typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}


def type_name(hint: Any) -> str:
    """The name of a value's type in error messages."""
    items = typing.get_args(hint)
    return f"a list, each {_TYPE_NAMES[items[0]]}" if items else _TYPE_NAMES[hint]


def sections(section: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(name, dataclass) of every section, the outermost one as ""."""
    yield prefix.rstrip("."), section
    for key, hint in section_types(section).items():
        if section_types(hint):
            yield from sections(hint, f"{prefix}{key}.")


@functools.cache
def types_of_keys() -> dict[str, Any]:
    """Dotted key ("train.steps") -> type, of all keys."""
    return {
        f"{name}.{key}".lstrip("."): hint
        for name, section in sections()
        for key, hint in section_types(section).items()
        if not section_types(hint)
    }


def meanings(section: type) -> tuple[str, dict[str, str]]:
    """(what the section is, key -> meaning) of a dataclass's docstring.

    Raises ValueError where a key has no meaning, two of them, or is none of the section's.
    """
    about: list[str] = []
    found: dict[str, list[str]] = {}
    current = about
    for line in (inspect.getdoc(section) or "").splitlines():
        if match := _KEYS.match(line):
            current = [line[match.end() :]]
            for key in match[1].split(", "):
                if key in found:
                    raise ValueError(f"{section.__name__}.{key}: described twice")
                found[key] = current
        else:
            current.append(line.strip())
    types = section_types(section)
    values = {key for key, hint in types.items() if not section_types(hint)}
    if wrong := values ^ set(found):
        raise ValueError(f"{section.__name__}: {', '.join(sorted(wrong))}: one line each, please")
    return " ".join(" ".join(about).split()), {
        key: " ".join(text).strip() for key, text in found.items()
    }


def nearest(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """The most similar of some names; "" if none is similar."""
    if len(name) > _LONGEST:
        return ""
    return (difflib.get_close_matches(name, known, 1, cutoff) or [""])[0]


def nearest_keys(name: str) -> tuple[str, ...]:
    """The dotted keys that a wrong one may mean, at most three; () if none is near.

    First those of its section that begin like it or are similar, then those of the same name in
    other sections, else the most similar of all.
    """
    name = name.replace("-", "_")
    section, _, last = name.rpartition(".")
    split = {key: key.rpartition(".") for key in types_of_keys()}
    beside = [own for where, _, own in split.values() if where == section]
    longer = [own for own in beside if last and own.startswith(f"{last}_")]
    found = longer or ([similar] if (similar := nearest(last, beside)) else [])
    here = [f"{section}.{own}".lstrip(".") for own in found]
    same = sorted((key for key, (_, _, own) in split.items() if own == last), key=_depth)
    if not beside and len(same) > 1 and (best := nearest(name, same, _WHOLE)):
        same = [best]  # of a section that is misspelt
    found = [*here, *same] or list(filter(None, [nearest(name, list(split), _WHOLE)]))
    return tuple(dict.fromkeys(found))[:3]


def _depth(key: str) -> int:
    return key.count(".")
