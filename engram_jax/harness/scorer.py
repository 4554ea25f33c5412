"""Continuations scored, and prompts continued, by the inference engine on one or several processes.

A request of several choices is several pairs of one context: the pages of the context are computed
once (serve/prefixes.py), and choices that differ in their last token alone are one prompt. Nothing
here knows of lm-eval.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from engram_jax.config.errors import UserError
from engram_jax.distributed.consensus import gather
from engram_jax.serve.engine import Engine
from engram_jax.serve.request import MAX_NEXT, Completion, Finish, SamplingParams

Pair = tuple[Sequence[int], Sequence[int]]  # context, continuation


class Prompt(NamedTuple):
    """What is computed once for some pairs.

    tokens: all but the last token of each of them. pairs: (its number, the first of its
    continuation's tokens in `tokens`, its last token).
    """

    tokens: tuple[int, ...]
    pairs: list[tuple[int, int, int]]

    @property
    def first(self) -> int:
        """The first token whose log-probability is wanted."""
        return min(first for _, first, _ in self.pairs)


def prompts_of(pairs: Sequence[Pair], longest: int, unit: int) -> list[Prompt]:
    """The prompts that score pairs, in the order in which they are computed.

    longest: tokens that the model reads at once; of a longer context the beginning is left out.
    unit: tokens whose pages can be shared: prompts that begin with the same `unit` tokens follow
    each other, the longest first.

    Raises UserError for a continuation without tokens, or too long to have a context.
    """
    made: list[Prompt] = []
    last: dict[tuple[int, ...], Prompt] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= longest:
            raise UserError(
                f"a continuation of {len(continuation)} tokens: must be from 1 to {longest}"
            )
        if not context:
            raise UserError("a continuation without a context: must have at least one token")
        *tokens, end = [*context, *continuation][-longest - 1 :]
        prompt = last.get(key := tuple(tokens))
        if prompt is None or len(prompt.pairs) == MAX_NEXT:
            prompt = last[key] = Prompt(key, [])
            made.append(prompt)
        prompt.pairs.append((number, len(tokens) + 1 - len(continuation), end))
    together: dict[tuple[int, ...], int] = {}
    for prompt in made:
        begins = prompt.tokens[:unit]
        together[begins] = max(together.get(begins, 0), len(prompt.tokens))

    def place(prompt: Prompt) -> tuple[Any, ...]:
        begins = prompt.tokens[:unit]
        return -together[begins], begins, -prompt.first, prompt.tokens[: prompt.first]

    return sorted(made, key=place)


def scores_of(prompts: Sequence[Prompt], found: Sequence[Completion]) -> list[tuple[float, bool]]:
    """For each pair: the sum of its continuation's log-probabilities (nats), and whether each of
    its tokens is the likeliest one."""
    scores: dict[int, tuple[float, bool]] = {}
    for prompt, completion in zip(prompts, found, strict=True):
        told = completion.prompt_logprobs
        inside = len(prompt.tokens) - prompt.first  # the rest are the pairs' last tokens
        for place, (number, first, _) in enumerate(prompt.pairs):
            own = [*told[first - prompt.first : inside], told[inside + place]]
            greedy = all(p.token == next(iter(p.top)) for p in own)
            scores[number] = (sum(p.logprob for p in own), greedy)
    return [scores[number] for number in range(len(scores))]


class Scorer:
    """An engine that every process of a launch has: process 0 is asked, all compute.

    After `release`, or a call of `follow` on the others, it is not used again.
    """

    def __init__(self, engine: Engine):
        self.engine, self.longest = engine, engine.capacity
        self._unit = engine.serve.prefill_chunk  # at least: it decides an order, no result

    def score(self, pairs: Sequence[Pair], what: str = "") -> list[tuple[float, bool]]:
        """`scores_of` each pair. what: told beside the progress. Errors: as `prompts_of`, and a
        UserError if rows of the memory cannot be read."""
        prompts = prompts_of(pairs, self.longest, self._unit)
        params = [
            SamplingParams(
                max_tokens=0,
                logprobs=1,
                prompt_logprobs=True,
                prompt_logprobs_from=prompt.first,
                next_ids=tuple(end for _, _, end in prompt.pairs),
            )
            for prompt in prompts
        ]
        found = self._run([list(prompt.tokens) for prompt in prompts], params, what)
        return scores_of(prompts, found)

    def complete(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], what: str = ""
    ) -> list[str]:
        """The text that follows each prompt; the longest are computed first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - params[i].max_tokens)
        found = self._run([list(prompts[i]) for i in order], [params[i] for i in order], what)
        texts = {i: completion.text for i, completion in zip(order, found, strict=True)}
        return [texts[i] for i in range(len(prompts))]

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], what: str
    ) -> list[Completion]:
        for prompt, how in zip(prompts, params, strict=True):
            self.engine.check(prompt, how)  # an error here is process 0's alone: before it asks
        if jax.process_count() > 1:
            gather(json.dumps([prompts, [dataclasses.asdict(how) for how in params]]))
        with tqdm(total=len(prompts), desc=what, disable=None, unit=" prompts") as bar:
            found = self.engine.generate(prompts, params, bar.update)
        if errors := [c.error for c in found if c.finish == Finish.ERROR]:
            raise UserError(errors[0])
        return found

    def follow(self) -> None:
        """Compute what process 0 asks for, until its `release`; on the other processes."""
        while work := gather("")[0]:
            prompts, params = json.loads(work)
            given = [{k: _tuples(v) for k, v in how.items()} for how in params]
            self.engine.generate(prompts, [SamplingParams(**how) for how in given])

    def release(self) -> None:
        """Let the other processes go on behind `follow`."""
        if jax.process_count() > 1:
            gather("")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
