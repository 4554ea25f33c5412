"""Streams one sequence's tokens as text, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engram_jax.addressing.detokenizer import Detokenizer, follows_text


def continuation(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after a prompt."""
    stream = TextStream(tokenizer, prompt=prompt)
    return "".join(stream.push(token)[0] for token in ids) + stream.flush()[0]


class TextStream:
    """The text of a sequence's tokens after its prompt: push() every one of them, then flush().

    prompt: the tokens before. After text a word keeps its space, which many tokenizers drop at the
    beginning.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        inside = follows_text(tokenizer, prompt)
        self._tokens, self._stop = Detokenizer(tokenizer, inside=inside), tuple(stop)
        self._rest = ""  # text held back

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is ready, whether a stop string has appeared)."""
        return self._ready("".join(self._tokens.push(token)), final=False)

    def flush(self) -> tuple[str, bool]:
        """The remaining text at the end, with incomplete stop strings and broken characters; then
        whether a stop string has appeared."""
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
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
