"""Patterns that choose arrays by their paths: `train.trainable`.

A path is that of the checkpoint: "embedding", "engrams/1/projection",
"blocks/0/blocks/attention/q_proj" (a stack of equal layers, named by its first), "memory/1" (the
table of Engram layer 1). A pattern is a path, or the beginning of paths up to a "/"; "*" stands for
any characters, "/" among them: "engrams" is every array of every Engram module, "*/q_proj" all
query projections, "blocks/0" the stack that begins with layer 0.

Of several patterns the last that matches a path decides; "!" before one takes away what it matches.
What no pattern matches is not chosen, unless the first begins with "!": then all is, but for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from engram_jax.config.errors import UserError

EXCEPT = "!"


def chosen(patterns: Sequence[str], names: Iterable[str], key: str) -> frozenset[str]:
    """Those of `names` that the patterns choose; all without patterns.

    key: of the configuration, for messages. Raises UserError for a pattern that matches none of
    `names`, with the nearest that would, and if nothing is chosen.
    """
    names = list(names)
    if not patterns:
        return frozenset(names)
    found = set(names) if patterns[0].startswith(EXCEPT) else set()
    for pattern in patterns:
        matched = {name for name in names if matches(pattern.removeprefix(EXCEPT), name)}
        if not matched:
            raise UserError(
                f"config.{key}: {pattern!r} matches no parameter and no table that is trained;"
                f" the nearest is {nearest(pattern, names)!r}"
            )
        found = found - matched if pattern.startswith(EXCEPT) else found | matched
    if not found:
        raise UserError(f"config.{key} = {tuple(patterns)}: chooses nothing; must leave something")
    return frozenset(found)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, without its "!", matches the path `name` or a path that it is below."""
    pattern = pattern.strip("/").replace("[", "[[]")  # fnmatch's sets are none of ours
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")


def nearest(pattern: str, names: Iterable[str]) -> str:
    """The pattern most like `pattern` that matches something: a path, its beginning, or its end."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split("/")
        found.update(dict.fromkeys("/".join(parts[:n]) for n in range(1, len(parts) + 1)))
        found.update(dict.fromkeys("*/" + "/".join(parts[n:]) for n in range(1, len(parts))))
    bare = pattern.removeprefix(EXCEPT).strip("/")
    best = difflib.get_close_matches(bare, found, 1, cutoff=0.0)
    return pattern[: pattern.startswith(EXCEPT)] + best[0]
