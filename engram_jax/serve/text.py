"""Tokens of one sequence to text: complete characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
_HELD = 32  # tokens without a whole character, after which it is tried to let some go


class TokenText:
    """Text of tokens as they come; together what `tokenizer.decode` makes of all of them.

    What ends in a broken character waits for what may complete it. A tokenizer that takes back
    what it has said (byte fallback does, where a later byte breaks a row of them) keeps its word
    here: characters that have been told stay.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []  # tokens told last, as context, and those of which nothing is
        self._text = ""  # of the window
        self._told = 0  # characters of it
        self._fresh = 0  # tokens of it of which nothing is told

    def push(self, token: int) -> str:
        """What is complete now."""
        text = self._decode([*self._window, token])
        if text == self._text and not self._decode([token]):
            return ""  # a special token: in the window it would stand between bytes
        self._window = [*self._window, token]  # a copy shares the list
        self._text, self._fresh = text, self._fresh + 1
        if text.endswith(BROKEN):
            return self._let_go() if self._fresh % _HELD == 0 else ""
        return self._tell()

    def flush(self) -> str:
        """The rest at the end."""
        return self._tell()

    def _tell(self) -> str:
        """The rest of the window's text; the tokens it is of are the context of the next."""
        new = self._text[self._told :]
        self._window = self._window[len(self._window) - self._fresh :]
        self._text, self._fresh = self._decode(self._window), 0
        self._told = len(self._text)
        return new

    def _let_go(self) -> str:
        """Of a long row of broken characters, what no later byte can mend: all that waits is
        decoded again at every token."""
        window = self._window
        for at in range(len(window) - 1, max(0, len(window) - 5), -1):
            gone, kept = self._decode(window[:at]), self._decode(window[at:])
            if gone + kept == self._text:
                self._window, self._text = window[at:], kept
                new, self._told, self._fresh = gone[self._told :], 0, len(window) - at
                return new
        return ""

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


class TextStream:
    """push() every token, then flush()."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokens, self._stop = TokenText(tokenizer), tuple(stop)
        self._rest = ""  # what has not been sent

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is ready, whether a stop string has appeared)."""
        return self._ready(self._tokens.push(token), final=False)

    def flush(self) -> tuple[str, bool]:
        """The rest at the end: also what might have become a stop string, and broken characters."""
        return self._ready(self._tokens.flush(), final=True)

    def _ready(self, new: str, final: bool) -> tuple[str, bool]:
        self._rest += new
        found = [at for s in self._stop if (at := self._rest.find(s)) >= 0]
        end = min(found) if found else len(self._rest)
        if not found and not final:
            end -= max((_overlap(self._rest, s) for s in self._stop), default=0)
        text, self._rest = self._rest[:end], self._rest[end:]
        return text, bool(found)


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
