"""Streams one sequence's tokens as text, up to a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from engram_jax.addressing.detokenizer import Detokenizer, follows_text

T = TypeVar("T")


def continuation(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after a prompt."""
    stream: TextStream[None] = TextStream(tokenizer, prompt=prompt)
    return "".join(stream.push(token)[0] for token in ids) + stream.flush()[0]


class _Match:
    """How much of one stop string the text ends with (Knuth, Morris, Pratt 1977).

    Amortised constant time for a character, whatever text and string; the table of fallbacks is
    made as far as the text has matched.
    """

    def __init__(self, stop: str):
        self.stop, self.length = stop, 0
        # Of the beginning of i + 1 characters: the longest other beginning that it ends with.
        self._shorter = [0]

    def push(self, character: str) -> bool:
        """Whether the string is complete now; the next match may overlap this one."""
        length, stop = self.length, self.stop
        while length and stop[length] != character:
            length = self._fallback(length)
        if stop[length] == character:
            length += 1
        done = length == len(stop)
        self.length = self._fallback(length) if done else length
        return done

    def _fallback(self, length: int) -> int:
        shorter, stop = self._shorter, self.stop
        while len(shorter) < length:
            found = shorter[-1]
            while found and stop[found] != stop[len(shorter)]:
                found = shorter[found - 1]
            shorter.append(found + (stop[found] == stop[len(shorter)]))
        return shorter[length - 1]


class TextStream(Generic[T]):
    """The text of a sequence's tokens after its prompt: push() every one of them, then flush().

    prompt: the tokens before. After text a word keeps its space, which many tokenizers drop at the
    beginning. The text ends before the stop string that is complete first, the longest if several
    are at once, or, with `include`, behind it, wherever tokens end.

    Something of type T may be pushed with a token: `listed` gives it back when text behind the
    token's beginning has been given out, at once where there are no stop strings.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        include: bool = False,
        skip_special_tokens: bool = True,
    ):
        inside = follows_text(tokenizer, prompt)
        self._tokens = Detokenizer(tokenizer, inside=inside)
        self._skip, self._include = skip_special_tokens, include
        self._stops = [_Match(s) for s in stop]
        self._first = frozenset(s[0] for s in stop)
        self._rest = ""  # text held back
        self._given = 0  # characters
        self._stopped = False
        self._unlisted: deque[tuple[int, T]] = deque()  # with where the token begins

    def push(self, token: int, item: T | None = None, *, stops: bool = True) -> tuple[str, bool]:
        """(text that is ready, whether a stop string has appeared).

        stops: whether stop strings that this token completes count.
        """
        before, own = self._tokens.push(token, self._skip)
        if item is not None:
            self._unlisted.append((self._tokens.length - len(own), item))
        return self._ready(before + own, final=False, stops=stops)

    def flush(self) -> tuple[str, bool]:
        """The remaining text at the end, with incomplete stop strings and broken characters; then
        whether a stop string has appeared."""
        if self._stopped:
            return "", True
        return self._ready(self._tokens.flush(), final=True, stops=True)

    def listed(self, *, final: bool = False) -> list[T]:
        """What was pushed with tokens that belong to the text for certain; once each. final: after
        the last token; those that begin where a stop string ended the text, or behind, never."""
        found = []
        everything = not self._stops or (final and not self._stopped)
        while self._unlisted and (everything or self._unlisted[0][0] < self._given):
            found.append(self._unlisted.popleft()[1])
        return found

    def _ready(self, new: str, final: bool, stops: bool) -> tuple[str, bool]:
        if self._stopped:
            return "", True
        end = self._stop_in(new, stops)
        self._rest += new
        if end is None:
            held = 0 if final else max((match.length for match in self._stops), default=0)
            end = len(self._rest) - held
        else:
            end += len(self._rest) - len(new)
            self._stopped = True
        text, self._rest = self._rest[:end], self._rest[end:]
        self._given += len(text)
        return text, self._stopped

    def _stop_in(self, new: str, stops: bool) -> int | None:
        """Where the text ends, from the beginning of `new`; None: no stop string is complete."""
        matches = self._stops
        if not any(match.length for match in matches) and self._first.isdisjoint(new):
            return None
        for at, character in enumerate(new, 1):
            done = [len(match.stop) for match in matches if match.push(character)]
            if done and stops:
                return at if self._include else at - max(done)
        return None
