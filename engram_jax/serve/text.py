"""Tokens of one sequence to text: complete characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_HELD = 32  # tokens without a whole character, after which it is tried to let some go


class TextStream:
    """push() every token, then flush()."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._held: list[int] = []  # tokens of which nothing has been decoded
        self._decoded = ""  # everything so far
        self._sent = 0

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is ready, whether a stop string has appeared)."""
        self._ids.append(token)
        self._held.append(token)
        new = self._stream.step(self._tokenizer, token)
        if new is not None:
            self._held = []
            self._decoded += new
        elif len(self._held) % _HELD == 0:
            self._let_go()
        return self._ready(final=False)

    def _let_go(self) -> None:
        """Of a long row of broken characters, what no later byte can mend: the stream decodes all
        that it holds at every step."""

        def decode(ids: list[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

        whole = decode(self._held)
        for count in range(len(self._held) - 1, len(self._held) - 5, -1):
            gone, kept = self._held[:count], self._held[count:]
            if decode(gone) + decode(kept) == whole:
                self._decoded += decode(gone)
                self._held, self._stream = kept, DecodeStream(skip_special_tokens=True)
                for token in kept:
                    self._decoded += self._stream.step(self._tokenizer, token) or ""
                return

    def flush(self) -> tuple[str, bool]:
        """The rest at the end: also what might have become a stop string, and broken characters."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._ready(final=True)

    def _ready(self, final: bool) -> tuple[str, bool]:
        found = [at for s in self._stop if (at := self._decoded.find(s, self._sent)) >= 0]
        end = min(found) if found else len(self._decoded)
        if not found and not final:
            end -= max((_overlap(self._decoded, s) for s in self._stop), default=0)
        text = self._decoded[self._sent : end]
        self._sent = max(self._sent, end)
        return text, bool(found)


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
