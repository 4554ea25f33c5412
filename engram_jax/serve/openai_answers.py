"""What the engine says of a sequence, as OpenAI's choices: text, log-probabilities, usage."""

from __future__ import annotations

import copy
import math
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from engram_jax.serve.openai_api import CompletionRequest
from engram_jax.serve.request import Completion, Delta, Finish, Logprob
from engram_jax.serve.text import TokenText


class TokenTexts:
    """Token ids as the texts that log-probabilities are listed by."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._byte_level = tokenizer is not None and "ByteLevel" in repr(tokenizer.decoder)
        self._echoed: dict[tuple[int, ...], tuple[tuple[list[str], list[int]], Places]] = {}

    def text(self, token: int) -> str:
        """A part of a character is "bytes:" and its bytes, as with OpenAI; without a tokenizer,
        "token_id:" and the id."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text
        piece = self.tokenizer.id_to_token(token) or ""
        if self._byte_level and all(c in byte_of() for c in piece):
            return "bytes:" + "".join(f"\\x{byte_of()[c]:02x}" for c in piece)
        return text

    def echoed(self, ids: Sequence[int]) -> tuple[tuple[list[str], list[int]], Places]:
        """(texts and offsets of a prompt, what goes on behind it); for all choices once."""
        key = tuple(ids)
        if key not in self._echoed:
            places = Places(self)
            self._echoed[key] = places.add(ids), places
        listed, places = self._echoed[key]
        return listed, places.copy()

    def join(self, ids: Sequence[int]) -> str:
        """The text of a prompt that was given as ids."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


@lru_cache
def byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins of bytes (byte-level BPE)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Places:
    """Tokens one after the other: the text each is listed by, and where it begins."""

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        whole = texts.tokenizer
        self._stream = None if whole is None else TokenText(whole, skip_special_tokens=False)
        self._offset = 0  # characters of the text before the next token

    def add(self, ids: Sequence[int]) -> tuple[list[str], list[int]]:
        """(texts, offsets in characters) of the next tokens."""
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            if self._stream is not None:
                self._offset += len(self._stream.push(token))
        return [self._texts.text(token) for token in ids], offsets

    def copy(self) -> Places:
        """Where this one is, to go on by itself."""
        one = copy.copy(self)
        one._stream = copy.copy(self._stream)
        return one


class Choice:
    """One choice of the answer, delta by delta."""

    def __init__(self, request: CompletionRequest, index: int, texts: TokenTexts, eos: int | None):
        self._request, self._texts, self._eos = request, texts, eos
        self._prompt = request.prompts[index // request.n]
        self._index = index
        self._begun = False
        self._places = Places(texts)
        self._last: int | None = None  # token
        self.generated = 0

    def add(self, delta: Delta) -> dict[str, Any] | None:
        """What it adds to the choice, in the form of a chunk; None if that is nothing.

        Clients that score a continuation (lm-eval) echo it, ask for one more token and drop the
        last entry: of such a request that token is listed even where it is the end of sequence.
        """
        request = self._request
        first, self._begun = not self._begun, True
        text = delta.text
        ids = list(delta.tokens)
        echoed: list[int] = []
        self.generated += len(ids)
        self._last = ids[-1] if ids else self._last
        if first and request.echo:
            given, echoed = self._prompt.text, list(self._prompt.ids)
            text = (self._texts.join(echoed) if given is None else given) + text
        listed = None
        if request.logprobs is not None:
            entries = [
                *([None] if echoed else []),
                *(delta.prompt_logprobs if echoed else ()),
                *delta.logprobs,
            ]
            listed = self._listed(echoed, ids, entries)
        extra: dict[str, Any] = {"token_ids": ids} if request.return_token_ids else {}
        if request.return_token_ids and first:
            extra["prompt_token_ids"] = list(self._prompt.ids)
        if not (text or ids or delta.finish or echoed):
            return None
        reason = delta.finish.value if delta.finish else None
        ended = self._last is not None and self._last == self._eos
        if reason and ended and not request.ignore_eos:
            reason = Finish.STOP.value
        return {
            "text": text,
            "index": self._index,
            "logprobs": listed,
            "finish_reason": reason,
            **extra,
        }

    def _listed(
        self, echoed: list[int], ids: list[int], entries: Sequence[Logprob | None]
    ) -> dict[str, Any]:
        tokens: list[str] = []
        offsets: list[int] = []
        if echoed:
            (tokens, offsets), self._places = self._texts.echoed(echoed)
        more = self._places.add(ids)
        return {
            "tokens": [*tokens, *more[0]],
            "token_logprobs": [None if e is None else _finite(e.logprob) for e in entries],
            "top_logprobs": [None if e is None else self._top(e) for e in entries],
            "text_offset": [*offsets, *more[1]],
        }

    def _top(self, entry: Logprob) -> dict[str, float]:
        """Likeliest first, and the chosen one, too; of tokens with the same text, the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in [*entry.top.items(), (entry.token, entry.logprob)]:
            top.setdefault(self._texts.text(token), _finite(logprob))
        return top


class Answer:
    """The whole answer to a request: objects to send."""

    def __init__(
        self, request: CompletionRequest, model: str, tokenizer: Any, eos: int | None = None
    ):
        texts = TokenTexts(tokenizer)
        self._request = request
        self.choices = [Choice(request, i, texts, eos) for i in range(len(request.params))]
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self) -> dict[str, int]:
        prompt = self._request.prompt_tokens
        generated = sum(choice.generated for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A streamed event."""
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def last_chunk(self) -> dict[str, Any] | None:
        """The event with the usage, if it was asked for."""
        if not self._request.include_usage:
            return None
        return {**self._head, "choices": [], "usage": self.usage()}

    def whole(self, deltas: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """Everything in one object. deltas: of every choice."""
        pairs = zip(self.choices, deltas, strict=True)
        choices = [choice.add(_together(parts)) for choice, parts in pairs]
        return {**self._head, "choices": choices, "usage": self.usage()}


def _together(deltas: Sequence[Delta]) -> Delta:
    done = Completion.of(deltas)
    return Delta(
        deltas[0].request, done.tokens, done.text, done.logprobs, done.prompt_logprobs, done.finish
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI sends for it."""
    return logprob if math.isfinite(logprob) else -9999.0
