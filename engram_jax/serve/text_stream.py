"""Tokens of one sequence to text: what is certain, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engram_jax.addressing.detokenizer import Detokenizer, follows_text


def continuation(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` behind a prompt."""
    stream = TextStream(tokenizer, prompt=prompt)
    return "".join(stream.push(token)[0] for token in ids) + stream.flush()[0]


class TextStream:
    """The text of a sequence's tokens behind its prompt: push() every one of them, then flush().

    prompt: the tokens before. Behind text a word has its space, which at a beginning many
    tokenizers drop.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        inside = follows_text(tokenizer, prompt)
        self._tokens, self._stop = Detokenizer(tokenizer, inside=inside), tuple(stop)
        self._rest = ""  # what has not been sent

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is ready, whether a stop string has appeared)."""
        return self._ready("".join(self._tokens.push(token)), final=False)

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
