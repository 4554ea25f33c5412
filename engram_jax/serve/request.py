"""The engine's requests and results: sampling parameters, streamed parts (deltas), completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engram_jax.config import GenerateConfig
from engram_jax.config.errors import UserError

MAX_LOGPROBS = 20  # alternatives per token; a constant of the compiled step
MAX_STOPS = 16
MAX_STOP_LENGTH = 1_000  # characters; all text held back for one is compared at every token


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


@dataclass(frozen=True)
class Delta:
    """What a step added to one request.

    text: complete characters only; empty without a tokenizer, or while a character or a possible
      stop string is incomplete.
    logprobs: of `tokens`, if asked for. prompt_logprobs: once, with the first delta.
    finish: set on the last delta. error: one line, with Finish.ERROR.
    """

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None
    error: str = ""


@dataclass(frozen=True)
class Completion:
    """All deltas of one request together."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    error: str = ""

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
            prompt_logprobs=tuple(p for d in deltas for p in d.prompt_logprobs),
            error=last.error,
        )
