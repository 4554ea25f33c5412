"""OpenAI's completions request, checked field by field, as prompts and sampling parameters."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram_jax.config.errors import UserError
from engram_jax.config.random_streams import SAMPLING, number
from engram_jax.serve.http.json_fields import ApiError, Fields, is_id
from engram_jax.serve.request import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

DEFAULT_TOKENS = 16  # OpenAI's
LARGEST = 2**31 - 1

# Fields that would change the answer if they were honoured -> values that change nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
}
PROMPT = "a text, a list of texts, a list of token ids or a list of lists of token ids"


@dataclass(frozen=True)
class Prompt:
    """text: None if it was given as ids. offsets: where in the text each token begins."""

    ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request. Choice i of the answer continues prompt i // n with `params[i]`."""

    prompts: tuple[Prompt, ...]
    params: tuple[SamplingParams, ...]
    n: int
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    return_token_ids: bool
    ignore_eos: bool

    @property
    def sequences(self) -> list[tuple[tuple[int, ...], SamplingParams]]:
        return [(self.prompts[i // self.n].ids, p) for i, p in enumerate(self.params)]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(p.ids) for p in self.prompts)


def parse_request(fields: Fields, *, tokenizer: Any, capacity: int, most: int) -> CompletionRequest:
    """The request. capacity: tokens of a sequence. most: sequences of a request.

    Encodes the prompts, which may take a while. Raises ApiError.
    """
    for name, neutral in UNSUPPORTED.items():
        fields.unsupported(name, neutral)
    if not (fields.get("user") is None or isinstance(fields.get("user"), str)):
        fields.wrong("user", "a text")
    n = fields.integer("n", 1, 1, most)
    if fields.integer("best_of", n, 1, most) not in (1, n):
        fields.wrong("best_of", f"1 or n = {n}")
    stream, echo = fields.boolean("stream"), fields.boolean("echo")
    options = fields.inner("stream_options")
    if fields.get("stream_options") is not None and not stream:
        fields.wrong("stream_options", "used with stream = true")
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    prompts = _prompts(fields, tokenizer, most // n)
    tokens = _max_tokens(fields, prompts, capacity, echo)
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    stop = fields.texts("stop", MAX_STOPS, MAX_STOP_LENGTH)
    if stop and tokenizer is None:
        fields.wrong("stop", "left out: the server has no tokenizer")
    ignore_eos = fields.boolean("ignore_eos")
    common: dict[str, Any] = {
        "max_tokens": tokens,
        "temperature": fields.number("temperature", 1.0, 0.0, 2.0),
        "top_p": fields.number("top_p", 1.0, 1e-6, 1.0),
        "top_k": max(fields.integer("top_k", 0, -1, LARGEST), 0),  # vLLM: -1 = all
        "stop": stop,
        "stop_ids": fields.integers("stop_token_ids", MAX_STOPS),
        "ignore_eos": ignore_eos or (tokens == 1 and logprobs is not None),  # Choice.add says why
        "logprobs": 0 if logprobs is None and tokens == 0 else logprobs,
        "prompt_logprobs": echo and (logprobs is not None or tokens == 0),
    }
    try:
        params = tuple(
            SamplingParams(seed=_seed(seed, i % n), **common) for i in range(len(prompts) * n)
        )
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return CompletionRequest(
        prompts=prompts,
        params=params,
        n=n,
        echo=echo,
        logprobs=logprobs,
        stream=stream,
        include_usage=options.boolean("stream_options.include_usage"),
        return_token_ids=fields.boolean("return_token_ids"),
        ignore_eos=ignore_eos,
    )


def _seed(seed: int | None, choice: int) -> int:
    """Of one of n choices: a given seed gives each of them again, and the next seed gives others
    (with seed + choice, the second choice of seed 5 would be the first of seed 6)."""
    if seed is None:
        return secrets.randbits(32)
    return number(seed % 2**32, SAMPLING, choice) if choice else seed % 2**32


def _prompts(fields: Fields, tokenizer: Any, most: int) -> tuple[Prompt, ...]:
    value = fields.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and is_id(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        fields.wrong("prompt", PROMPT)
    if len(value) > most:
        fields.wrong("prompt", f"at most {most} prompts (prompts x n is limited)")
    return tuple(_prompt(fields, item, tokenizer) for item in value)


def _prompt(fields: Fields, value: Any, tokenizer: Any) -> Prompt:
    if isinstance(value, list):
        if not all(map(is_id, value)):
            fields.wrong("prompt", PROMPT)
        prompt = Prompt(tuple(value))
    else:
        text = fields.text("prompt", value, PROMPT)
        if tokenizer is None:
            fields.wrong("prompt", "token ids: the server has no tokenizer")
        # `encode` would hold Python's lock, and with it everything, until it is done.
        found = tokenizer.encode_batch([text], add_special_tokens=False)[0]
        prompt = Prompt(tuple(found.ids), text, tuple(start for start, _ in found.offsets))
    if not prompt.ids:
        raise ApiError(400, "prompt: is empty; must have at least one token", "prompt")
    return prompt


def _max_tokens(fields: Fields, prompts: tuple[Prompt, ...], capacity: int, echo: bool) -> int:
    """Checked against what the longest prompt leaves."""
    least, longest = 0 if echo else 1, max(len(p.ids) for p in prompts)
    if longest + least > capacity:
        message = f"prompt: has {longest} tokens; must be from 1 to {capacity - least}"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    tokens = fields.integer("max_tokens", None, least, LARGEST)
    if tokens is None:  # the default is no wish: it must not refuse a prompt that fits
        return min(DEFAULT_TOKENS, capacity - longest)
    if longest + tokens > capacity:
        allowed = (
            f"from {least} to {capacity - longest}: a sequence has at most {capacity} tokens,"
            f" {longest} of them are the prompt's"
        )
        fields.wrong("max_tokens", allowed, "context_length_exceeded")
    return tokens
