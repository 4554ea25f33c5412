"""Converts the engine's results to OpenAI's choices: text, log-probabilities, usage."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from engram_jax.addressing.detokenizer import Detokenizer, bytes_of, follows_text, text_of
from engram_jax.serve.http.completion_request import CompletionRequest, Prompt
from engram_jax.serve.request import Completion, Delta, Finish, Logprob

LISTED = 64  # of a prompt; the entries of more are made while they are encoded
Made = Callable[[Iterable[Any]], Any]  # a list of it, or an iterator


@dataclass(frozen=True)
class Listed:
    """Tokens, each by its text, where that begins, and whether text comes before it; and the text
    of all of them, as far as it is certain."""

    tokens: list[str]
    offsets: list[int]
    inside: list[bool]
    text: str


class TokenTexts:
    """Token ids as the texts that log-probabilities are listed by."""

    def __init__(self, tokenizer: Any, as_ids: bool = False):
        """as_ids: every token is "token_id:" and its id."""
        self.tokenizer, self._as_ids = tokenizer, as_ids
        self._texts: dict[tuple[int, bool], str] = {}
        self._prompts: dict[Prompt, Listed] = {}

    def text(self, token: int, inside: bool = True) -> str:
        """Its text behind other text, or at a beginning. A part of a character is "bytes:" and
        its bytes, as with OpenAI; without a tokenizer, "token_id:" and the id."""
        if (token, inside) not in self._texts:
            self._texts[token, inside] = self._text(token, inside)
        return self._texts[token, inside]

    def _text(self, token: int, inside: bool) -> str:
        if self.tokenizer is None or self._as_ids:
            return f"token_id:{token}"
        if (data := bytes_of(self.tokenizer, token)) is not None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return text_of(self.tokenizer, token, inside)

    def prompt(self, prompt: Prompt) -> Listed:
        """A prompt's own text, or its tokens' if it was given as ids; for all choices once."""
        if prompt not in self._prompts:
            places = Places(self)
            found = places.add(prompt.ids, skip_special_tokens=False)
            text, offsets = found.text + places.rest(), found.offsets
            if prompt.text is not None:  # what a tokenizer normalises reads otherwise
                text, offsets = prompt.text, list(prompt.offsets)
            self._prompts[prompt] = replace(found, text=text, offsets=offsets)
        return self._prompts[prompt]


class Places:
    """Tokens one after the other, in a text.

    inside, start: whether text comes before, and how many characters.
    """

    def __init__(self, texts: TokenTexts, inside: bool = False, start: int = 0):
        self._texts, self._start, self._tokens = texts, start, None
        if texts.tokenizer is not None:
            self._tokens = Detokenizer(texts.tokenizer, inside=inside)

    def add(self, ids: Sequence[int], skip_special_tokens: bool = True) -> Listed:
        """The next tokens."""
        if self._tokens is None:
            return Listed([self._texts.text(t) for t in ids], [0] * len(ids), [True] * len(ids), "")
        tokens, offsets, insides, text = [], [], [], ""
        for token in ids:
            inside = self._tokens.inside
            before, own = self._tokens.push(token, skip_special_tokens)
            tokens.append(self._texts.text(token, inside))
            offsets.append(self._start + self._tokens.length - len(own))
            insides.append(inside)
            text += before + own
        return Listed(tokens, offsets, insides, text)

    def rest(self) -> str:
        """The text that was not certain before the end."""
        return "" if self._tokens is None else self._tokens.flush()


class Choice:
    """One choice of the answer, delta by delta."""

    def __init__(self, request: CompletionRequest, index: int, texts: TokenTexts, eos: int | None):
        self._request, self._texts, self._eos = request, texts, eos
        self._prompt = request.prompts[index // request.n]
        self._index = index
        self._begun = False
        self._places: Places | None = None  # behind the tokens that have been listed
        self._last: int | None = None  # token
        self.generated = 0

    def add(self, delta: Delta) -> dict[str, Any] | None:
        """What it adds to the choice, in the form of a chunk; None if that is nothing. Its lists of
        more than `LISTED` log-probabilities are iterators, for serve/http/encode.py.

        Clients that score a continuation (lm-eval) echo it, ask for one more token and drop the
        last entry: of such a request that token is listed even where it is the end of sequence.
        """
        request = self._request
        text, ids = delta.text, list(delta.tokens)
        self.generated += delta.sampled
        self._last = ids[-1] if ids else self._last
        first = not self._begun
        echoed = first and request.echo
        if not (text or ids or delta.finish or echoed):
            return None  # all of it is held back for a stop string
        self._begun = True
        if echoed:
            text = self._texts.prompt(self._prompt).text + text
        prompt = delta.prompt_logprobs
        made: Made = iter if len(prompt) > LISTED else list
        listed = None
        if request.logprobs is not None:
            before = ([None], prompt) if echoed else ()
            listed = self._listed(ids, lambda: chain(*before, delta.logprobs), made)
        extra: dict[str, Any] = {"token_ids": ids} if request.return_token_ids else {}
        if request.return_token_ids and first:
            extra["prompt_token_ids"] = list(self._prompt.ids)
        if request.prompt_logprobs is not None:
            extra["prompt_logprobs"] = made(chain([None], map(self._of_prompt, prompt)))
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
        self, ids: list[int], entries: Callable[[], Iterator[Logprob | None]], made: Made
    ) -> dict[str, Any]:
        parts: list[Listed] = []
        if self._places is None:
            parts = [self._texts.prompt(self._prompt)] if self._request.echo else []
            whole = self._texts.tokenizer
            behind = whole is None or follows_text(whole, self._prompt.ids)
            self._places = Places(self._texts, behind, sum(len(part.text) for part in parts))
        parts.append(self._places.add(ids, self._request.skip_special_tokens))
        inside = [inside for part in parts for inside in part.inside]
        pairs = zip(entries(), inside, strict=True)
        return {
            "tokens": [token for part in parts for token in part.tokens],
            "token_logprobs": made(None if e is None else _finite(e.logprob) for e in entries()),
            "top_logprobs": made(
                None if e is None else self._top(e, inside) for e, inside in pairs
            ),
            "text_offset": [at for part in parts for at in part.offsets],
        }

    def _top(self, entry: Logprob, inside: bool) -> dict[str, float]:
        """Likeliest first, and the chosen one, too; of tokens with the same text, the likeliest."""
        top: dict[str, float] = {}
        listed = list(entry.top.items())[: self._request.logprobs]
        for token, logprob in [*listed, (entry.token, entry.logprob)]:
            top.setdefault(self._texts.text(token, inside), _finite(logprob))
        return top

    def _of_prompt(self, entry: Logprob) -> dict[str, Any]:
        """vLLM's form: by token id; rank: among the listed ones, else null."""
        listed = list(entry.top.items())[: self._request.prompt_logprobs]
        ranks: dict[int, int | None] = {token: n for n, (token, _) in enumerate(listed, 1)}
        return {
            str(token): {
                "logprob": _finite(logprob),
                "rank": ranks.get(token),
                "decoded_token": self._texts.text(token),
            }
            for token, logprob in {entry.token: entry.logprob, **dict(listed)}.items()
        }


class Answer:
    """The whole answer to a request: objects to send. request_id: where the request has none."""

    def __init__(
        self,
        request: CompletionRequest,
        model: str,
        tokenizer: Any,
        eos: int | None = None,
        request_id: str | None = None,
    ):
        texts = TokenTexts(tokenizer, request.tokens_as_ids)
        self._request = request
        self.choices = [Choice(request, i, texts, eos) for i in range(request.choices)]
        self._head = {
            "id": f"cmpl-{request.request_id or request_id or uuid.uuid4().hex}",
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
        usage: dict[str, Any] = {"usage": None} if self._request.include_usage else {}
        if self._request.continuous_usage:
            usage = {"usage": self.usage()}
        return {**self._head, "choices": [choice], **usage}

    def last_chunk(self) -> dict[str, Any] | None:
        """The event with the usage, if it was asked for."""
        if not self._request.include_usage:
            return None
        return {**self._head, "choices": [], "usage": self.usage()}

    def whole(self, deltas: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """Everything in one object, for serve/http/encode.py: its choices are made while they are
        encoded, and its usage behind them. deltas: of every choice."""
        pairs = zip(self.choices, deltas, strict=True)
        choices = (choice.add(_together(parts)) for choice, parts in pairs)
        return {**self._head, "choices": choices, "usage": self.usage}


def _together(deltas: Sequence[Delta]) -> Delta:
    done = Completion.of(deltas)
    return Delta(
        request=deltas[0].request,
        tokens=done.tokens,
        text=done.text,
        logprobs=done.logprobs,
        prompt_logprobs=done.prompt_logprobs,
        finish=done.finish,
        sampled=done.sampled,
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI sends for it."""
    return logprob if math.isfinite(logprob) else -9999.0
