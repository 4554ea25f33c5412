"""The exception for a user's mistakes: launch.py prints it as one line and exits with status 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """Wrong input from the user; the message says what is wrong, where, and what is allowed."""


def one_of(choices: Sequence[str]) -> str:
    """The choices as the end of such a message."""
    return "one of " + ", ".join(repr(choice) for choice in choices)


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises UserError, naming a key of the configuration, its value and what is allowed, unless
    the condition holds."""
    if not condition:
        raise UserError(f"config.{key} = {value!r}: must be {allowed}")
