"""Runs what ordinary requests need before the first one comes, and tells of every program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.request import SamplingParams

# What is generated: greedily, with log-probabilities, and drawn beside one that has rules.
ROUNDS = (
    (SamplingParams(max_tokens=2, ignore_eos=True),),
    (SamplingParams(max_tokens=2, logprobs=0, ignore_eos=True),),
    (
        SamplingParams(max_tokens=2, temperature=1.0, ignore_eos=True),
        SamplingParams(max_tokens=2, presence_penalty=1.0, ignore_eos=True),
    ),
)


class Announced:
    """`steps`, which tells a line before each of its programs runs for the first time: it is
    compiled then, or found among those of earlier launches.

    For prompts and for decoding these are the parts of the model (`EngineSteps.programs`), the
    sampler with log-probabilities, and the one with rules. `first` is called before the others.
    """

    def __init__(self, steps: EngineSteps, tell: Callable[[str], None]):
        self._steps, self._tell = steps, tell
        self._seen: set[str] = set()
        self._what = ""
        self.count = 2 * (len(steps.programs) + 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._steps, name)

    def first(self, weights: Any, cache: Any, batch: Any, tokens: Any) -> Any:
        self._what = "decoding" if tokens is None else "prompts"
        self._announce("first")
        return self._steps.first(weights, cache, batch, tokens)

    def span(self, i: int, *rest: Any) -> Any:
        self._announce(f"span {self._steps.layers[i - 1]}")
        return self._steps.span(i, *rest)

    def sample(self, *rest: Any, logprobs: bool, listed: int) -> Any:
        self._announce("sample with log-probabilities" if logprobs else "sample")
        return self._steps.sample(*rest, logprobs=logprobs, listed=listed)

    def redraw(self, *rest: Any) -> Any:
        self._announce("sample with rules")
        return self._steps.redraw(*rest)

    def _announce(self, name: str) -> None:
        name = f"{name}, for {self._what}"
        if name not in self._seen:
            self._seen.add(name)
            self._tell(f"compiling program {len(self._seen)} of {self.count}: {name}")
