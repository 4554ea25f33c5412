"""The engine's requests and results: sampling parameters, streamed parts (deltas), completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, overload

import numpy as np

from engram_jax.config import GenerateConfig
from engram_jax.config.errors import UserError

MAX_LOGPROBS = 20  # alternatives per token; a constant of the compiled step
MAX_STOPS = 16
MAX_STOP_LENGTH = 1_000  # characters; so much text is held back at most
MAX_LISTED = 1_000  # token ids that logit_bias, or allowed_ids, names
MAX_BAD_WORDS = 32  # rows of token ids; HTTP's 16 words are two each
MAX_SALT = 256  # characters
MAX_NEXT = 32  # tokens of `next_ids`; a constant of the compiled step
MAX_PENALTY = 2.0  # OpenAI's and vLLM's limit of the presence and the frequency penalty


class QueueFullError(Exception):
    """The queue is full; try again later."""


class Finish(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end of sequence, a stop id or a stop string
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"  # its rows could not be read


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued. Raises UserError for a value out of range.

    temperature: 0 = greedy. top_k: 0 = all tokens. top_p: 1 = all.
    seed: the draws depend only on it and on the number of tokens generated so far.
    stop: strings; the text ends before the first that appears. stop_ids: likewise, token ids.
    logprobs: None = none; n = log-probabilities of the chosen and of the n likeliest tokens, of
      the model's own distribution (temperature 1, all tokens).
    prompt_logprobs: also those of the prompt's tokens from the second on; needs `logprobs`.
    prompt_logprobs_from: the first of these tokens, counted from 0; what is before the token that
      predicts it may be taken from other prompts (serve/prefixes.py), the same to the bit.
    next_ids: with them, those of these tokens, each as the one behind the prompt, in this order
      after the prompt's.
    min_tokens: no token of `stop_ids`, nor the end of sequence, is drawn among the first so many,
      and a stop string that is complete in their text does not count.
    include_stop: what stops the sequence belongs to it: the stop string, to its end, or the token.
    skip_special_tokens: special tokens have no text.
    cache_salt: what was computed of a prompt is used again for those of the same salt alone
      (serve/prefixes.py), so that nobody else learns from an answer's time what was asked before.

    The following change the logits before temperature, top_k and top_p, in this order (vLLM's):

    allowed_ids: only these are drawn; None = all. bad_words: rows of token ids; the last of a row
      is not drawn behind the others of it, which must be generated ones.
    logit_bias: (token id, what is added to its logit).
    repetition_penalty: divides the positive and multiplies the negative logit of each token that is
      in the prompt or was generated (arXiv 1909.05858, section 4.1). frequency_penalty,
      presence_penalty: subtracted as often as a token was generated; once, if it was.

    min_p: of what temperature leaves, tokens below this share of the likeliest one's probability
      are not drawn (arXiv 2407.01082); before top_k.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    prompt_logprobs_from: int = 1
    next_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = ""
    min_p: float = 0.0
    allowed_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        """Whether what is drawn depends on how often tokens were there before."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        return penalties != (1, 0, 0)

    @property
    def adjusts(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        listed = self.allowed_ids is not None or self.bad_words or self.logit_bias
        return bool(listed or self.penalises or self.min_tokens or self.min_p)

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

        least = 0 if self.prompt_logprobs else 1
        need(self.max_tokens >= least, "max_tokens", f"at least {least}")
        need(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            "a finite number of at least 0",
        )
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.top_k >= 0, "top_k", "at least 0")
        need(0 <= self.seed < 2**32, "seed", "from 0 to 2**32 - 1")
        need(
            len(self.stop) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP_LENGTH for s in self.stop),
            "stop",
            f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters",
        )
        need(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"from 0 to {MAX_LOGPROBS}",
        )
        need(
            not self.prompt_logprobs or self.logprobs is not None,
            "prompt_logprobs",
            "used with logprobs",
        )
        scored = self.prompt_logprobs
        need(
            self.prompt_logprobs_from == 1 or (scored and self.prompt_logprobs_from > 1),
            "prompt_logprobs_from",
            "at least 1, and used with prompt_logprobs",
        )
        need(
            not self.next_ids or (scored and len(self.next_ids) <= MAX_NEXT),
            "next_ids",
            f"at most {MAX_NEXT} token ids, and used with prompt_logprobs",
        )
        need(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"from 0 to max_tokens = {self.max_tokens}",
        )
        need(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        need(1e-3 <= self.repetition_penalty <= 1e3, "repetition_penalty", "from 0.001 to 1000")
        for name in ("frequency_penalty", "presence_penalty"):
            limits = f"from -{MAX_PENALTY:g} to {MAX_PENALTY:g}"
            need(abs(getattr(self, name)) <= MAX_PENALTY, name, limits)
        self._need_lists(need)

    def _need_lists(self, need: Callable[[bool, str, str], None]) -> None:
        allowed, biased = self.allowed_ids, [token for token, _ in self.logit_bias]
        need(
            allowed is None or 0 < len(allowed) <= MAX_LISTED,
            "allowed_ids",
            f"from 1 to {MAX_LISTED} token ids",
        )
        need(
            len(biased) <= MAX_LISTED
            and len(set(biased)) == len(biased)
            and all(abs(value) <= 100 for _, value in self.logit_bias),
            "logit_bias",
            f"at most {MAX_LISTED} pairs of different token ids and numbers from -100 to 100",
        )
        need(
            len(self.bad_words) <= MAX_BAD_WORDS and all(self.bad_words),
            "bad_words",
            f"at most {MAX_BAD_WORDS} rows of at least one token id",
        )

    @classmethod
    def of(cls, config: GenerateConfig, **other: Any) -> SamplingParams:
        """The configuration's parameters; `other` overrides."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        return cls(**{name: getattr(config, name) for name in names} | other)


@dataclass(frozen=True)
class Logprob:
    """A token, its log-probability (nats), and those of the likeliest tokens, best first."""

    token: int
    logprob: float
    top: Mapping[int, float] = field(default_factory=dict)


class PromptLogprobs(Sequence[Logprob]):
    """Log-probabilities of a prompt's tokens, held as the arrays that the device computed: an entry
    is made when it is asked for."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._length = 0

    def add(self, tokens: np.ndarray, own: np.ndarray, ids: np.ndarray, top: np.ndarray) -> None:
        """The next tokens [t], their log-probabilities [t], the likeliest tokens [t, n] and theirs
        [t, n]; copied."""
        self._parts.append((tokens.copy(), own.copy(), ids.copy(), top.copy()))
        self._length += len(tokens)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Logprob]:
        for part in self._parts:
            for at in range(0, len(part[0]), _TOGETHER):
                yield from _entries(part, slice(at, at + _TOGETHER))

    @overload
    def __getitem__(self, at: int) -> Logprob: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Logprob, ...]: ...
    def __getitem__(self, at: int | slice) -> Logprob | tuple[Logprob, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(self._length)[at])
        at = range(self._length)[at]
        for part in self._parts:
            if at < len(part[0]):
                return _entries(part, slice(at, at + 1))[0]
            at -= len(part[0])
        raise AssertionError("the parts are as long as the whole")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


_TOGETHER = 8  # entries that are made at once: one element of an array takes a microsecond


def _entries(part: tuple[np.ndarray, ...], at: slice) -> list[Logprob]:
    columns = [array[at].tolist() for array in part]
    return [
        Logprob(token, own, dict(zip(*listed, strict=True)))
        for token, own, *listed in zip(*columns, strict=True)
    ]


@dataclass(frozen=True)
class Delta:
    """What a step added to one request.

    tokens: of the answer. Where there are stop strings, a token is told when text behind its
      beginning is; those that begin where the text was stopped, or behind, never are.
    sampled: tokens that were drawn, those that end the answer included.
    text: complete characters only; empty without a tokenizer, or while a character or a possible
      stop string is incomplete.
    logprobs: of `tokens`, if asked for. prompt_logprobs: once, with the first delta; those of
      `next_ids` are its last.
    finish: set on the last delta. error: one line, with Finish.ERROR.
    """

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: Sequence[Logprob] = ()
    finish: Finish | None = None
    error: str = ""
    sampled: int = 0


@dataclass(frozen=True)
class Completion:
    """All deltas of one request together."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: Sequence[Logprob] = ()
    error: str = ""
    sampled: int = 0

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        last = deltas[-1]
        if last.finish is None:
            raise ValueError("the request has not ended")
        return cls(
            tokens=tuple(t for d in deltas for t in d.tokens),
            text="".join(d.text for d in deltas),
            finish=last.finish,
            logprobs=tuple(p for d in deltas for p in d.logprobs),
            prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), ()),
            error=last.error,
            sampled=sum(d.sampled for d in deltas),
        )
