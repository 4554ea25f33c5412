"""The exception for a user's mistakes: launch.py prints it as one line and exits with status 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN = 300  # characters of a foreign text in a message


class UserError(ValueError):
    """Wrong input from the user; the message says what is wrong, where, and what is allowed."""


def shown(value: Any, *, quoted: bool | None = None, most: int = _SHOWN) -> str:
    """Text from outside (a name in a file, a path) as a message shows it: on one line, printable,
    and short enough to be read.

    quoted: as a literal of Python; None = only where it would not be printable as it is. Bytes of a
    file's name that are not UTF-8 appear as \\udcff for 0xff. most: characters, the rest are dots.
    """
    text = value if isinstance(value, str) else str(value)
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    if quoted or (quoted is None and not cut.isprintable()):
        return repr(cut) if cut.isprintable() else ascii(cut)
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def one_of(choices: Sequence[str]) -> str:
    """The choices as the end of such a message."""
    return "one of " + ", ".join(repr(choice) for choice in choices)


def did_you_mean(names: Sequence[str]) -> str:
    """The end of a message about an unknown name: "did you mean a, b or c?"; "" without any."""
    several = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)
    return f"did you mean {several}?" if names else ""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises UserError, naming a key of the configuration, its value and what is allowed, unless
    the condition holds."""
    if not condition:
        raise UserError(f"config.{key} = {value!r}: must be {allowed}")
