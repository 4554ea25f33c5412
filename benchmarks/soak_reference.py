"""Random requests, and what the model's plain forward pass says of their answers.

The reference runs uncached over prompt + answer, in batches, with addresses from NumPy. Every token
must be the argmax of its logits or what `sampling.sample` draws from them with the request's seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.memory.table import lookup
from engram_jax.model.sampling import key_of_token, sample
from engram_jax.serve.request import Finish, SamplingParams

BATCH = 64
# Settings are constants of the compiled sampler: few of them.
SETTINGS = [(0.5, 1.0, 0), (0.8, 0.9, 0), (1.0, 1.0, 0), (1.0, 0.8, 7), (1.6, 1.0, 3)]
NOISE = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5)  # of float32 sums in another order, relative to the logits


@dataclass(frozen=True)
class Ask:
    """A request. wrong: it must be refused. cancel_after: deltas; None = never."""

    prompt: list[int]
    params: SamplingParams
    wrong: bool = False
    cancel_after: int | None = None


def ask(seed: int, vocab: int, capacity: int) -> Ask:
    """Request number `seed`, whatever ran before."""
    rng = random.Random(seed)
    length = rng.randint(1, capacity * 2 // 3)
    prompt = [rng.randrange(vocab) for _ in range(length)]
    if rng.random() < 0.05:
        bad = rng.choice([[], [vocab], [-1], [0] * (capacity + 1), [10**30], [*prompt, vocab]])
        return Ask(bad, SamplingParams(), wrong=True)
    setting = rng.choice(SETTINGS) if rng.random() < 0.5 else (0.0, 1.0, 0)
    logprobs = rng.randint(0, 5) if rng.random() < 0.3 else None
    params = SamplingParams(
        max_tokens=rng.randint(1, capacity - length),
        temperature=setting[0],
        top_p=setting[1],
        top_k=setting[2],
        seed=rng.randrange(2**32),
        stop_ids=tuple(rng.sample(range(vocab), rng.randint(1, 3))) if rng.random() < 0.3 else (),
        ignore_eos=rng.random() < 0.3,
        logprobs=logprobs,
        prompt_logprobs=logprobs is not None and rng.random() < 0.3,
    )
    return Ask(prompt, params, cancel_after=rng.randint(0, 12) if rng.random() < 0.1 else None)


@dataclass(frozen=True)
class Answer:
    """finish: None = cancelled; the tokens until then are judged, too. logprobs: of prompt (from
    its second token on, if asked for) and answer, or none."""

    ask: Ask
    tokens: list[int]
    finish: Finish | None
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None


@dataclass
class Verdict:
    """Counts over all answers. ties: tokens that another rounding explains: (gap, noise)."""

    answers: int = 0
    cancelled: int = 0
    tokens: int = 0
    drawn: int = 0
    wrong: list[str] = field(default_factory=list)
    ties: list[float] = field(default_factory=list)
    logprob_error: float = 0.0


class Reference:
    """`judge` answers; they are looked at in batches, the last with `finish`."""

    def __init__(self, program: Any, weights: Any, capacity: int, eos: int, tokenizer: Any):
        self.verdict = Verdict()
        self._program, self._weights, self._eos = program, weights, eos
        self._shape, self._tokenizer = (BATCH, capacity), tokenizer
        self._waiting: list[Answer] = []

        def forward(weights: Any, tokens: jax.Array, ids: dict[str, jax.Array]) -> jax.Array:
            rows = {k: lookup(weights.rows[k], a) for k, a in ids.items()}
            model = program.model(weights.params, weights.router_bias)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return model.logits(model(tokens, rows, positions, jnp.ones_like(tokens)).hidden)

        self._forward = jax.jit(forward)

    def judge(self, answer: Answer) -> None:
        self._waiting.append(answer)
        if len(self._waiting) == BATCH:
            self.finish()

    def finish(self) -> Verdict:
        answers, self._waiting = self._waiting, []
        tokens = np.zeros(self._shape, np.int32)
        for row, answer in zip(tokens, answers, strict=False):
            fed = [*answer.ask.prompt, *answer.tokens]
            row[: len(fed)] = fed
        canonical = canonicalise(tokens, self._program.addressing.compression)
        ids = {
            str(k): addresses(canonical, layer).astype(np.int32)
            for k, layer in self._program.addressing.layers.items()
        }
        logits = np.asarray(self._forward(self._weights, tokens, ids))
        for row, answer in zip(logits, answers, strict=False):
            self._judge(answer, row)
        return self.verdict

    def _judge(self, answer: Answer, logits: np.ndarray) -> None:
        """logits [capacity, V] of prompt + answer."""
        verdict, params, n = self.verdict, answer.ask.params, len(answer.ask.prompt)
        verdict.answers += 1
        verdict.cancelled += answer.finish is None
        verdict.tokens += len(answer.tokens)
        verdict.drawn += len(answer.tokens) * (params.temperature > 0)
        ends = {*params.stop_ids} | ({self._eos} if not params.ignore_eos else set())
        expected = self._draw(logits[n - 1 :], params)
        for step, token in enumerate(answer.tokens):
            if token in ends:
                verdict.wrong.append(f"{answer}: goes on after an end")
            if token != expected[step]:
                self._differs(answer, logits[n - 1 + step], step, token)
        count = len(answer.tokens)
        if answer.finish == Finish.STOP and int(expected[count]) not in ends:
            verdict.wrong.append(f"{answer}: ends without a reason")
        if answer.finish == Finish.LENGTH and count != params.max_tokens:
            verdict.wrong.append(f"{answer}: too short")
        if answer.finish not in (None, Finish.STOP, Finish.LENGTH):
            verdict.wrong.append(f"{answer}: {answer.finish}")
        if answer.text is not None and answer.finish is not None:
            whole = self._tokenizer.decode(answer.tokens, skip_special_tokens=True)
            if answer.text != whole:
                verdict.wrong.append(f"{answer}: the text should be {whole!r}")
        if params.logprobs is not None and answer.finish is not None:
            self._compare_logprobs(answer, logits)

    def _draw(self, logits: np.ndarray, params: SamplingParams) -> np.ndarray:
        """The token after each row, as its steps from 0 draw it."""
        if params.temperature == 0:
            return logits.argmax(-1)
        padded = np.zeros((self._shape[1], logits.shape[1]), np.float32)
        padded[: len(logits)] = logits
        steps = np.arange(len(padded))
        setting = params.temperature, params.top_p, params.top_k
        return np.asarray(_draw(padded, np.uint32(params.seed), steps, setting))

    def _differs(self, answer: Answer, logits: np.ndarray, step: int, token: int) -> None:
        """Wrong, unless as much noise as rounding makes of these logits draws that token, too."""
        params, rng = answer.ask.params, np.random.default_rng(0)
        for noise in NOISE:
            scale = noise * np.abs(logits).max()
            near = logits + rng.uniform(-scale, scale, (self._shape[1], len(logits)))
            if params.temperature == 0:
                found = near.argmax(-1)
            else:
                setting = params.temperature, params.top_p, params.top_k
                steps = np.full(len(near), step)
                found = np.asarray(
                    _draw(near.astype(np.float32), np.uint32(params.seed), steps, setting)
                )
            if token in found:
                self.verdict.ties.append(noise)
                return
        self.verdict.wrong.append(f"{answer}: token {step} is {token}")

    def _compare_logprobs(self, answer: Answer, logits: np.ndarray) -> None:
        prompt, n = answer.ask.prompt, len(answer.ask.prompt)
        first = 1 if answer.ask.params.prompt_logprobs else n
        fed = [*prompt, *answer.tokens]
        wide = logits.astype(np.float64)
        wide -= np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True))
        wide -= logits.max(-1, keepdims=True)
        expected = [wide[at - 1, fed[at]] for at in range(first, len(fed))]
        if len(expected) != len(answer.logprobs):
            self.verdict.wrong.append(f"{answer}: {len(expected)} log-probabilities expected")
            return
        error = np.abs(np.subtract(expected, answer.logprobs)).max(initial=0)
        self.verdict.logprob_error = max(self.verdict.logprob_error, float(error))


@partial(jax.jit, static_argnums=3)
def _draw(logits: jax.Array, seed: jax.Array, steps: jax.Array, setting: Sequence[Any]) -> Any:
    temperature, top_p, top_k = setting

    def one(row: jax.Array, step: jax.Array) -> jax.Array:
        key = key_of_token(seed, step)
        return sample(row[None], key, temperature=temperature, top_p=top_p, top_k=top_k)[0]

    return jax.vmap(one)(logits, steps)
