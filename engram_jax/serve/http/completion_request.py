"""OpenAI's completions request, checked field by field, as prompts and sampling parameters."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engram_jax.addressing.detokenizer import BROKEN
from engram_jax.config.errors import UserError
from engram_jax.config.random_streams import SAMPLING, number
from engram_jax.serve.http.completion_fields import check_fields
from engram_jax.serve.http.json_fields import ApiError, Fields, is_id, shown
from engram_jax.serve.request import (
    MAX_BAD_WORDS,
    MAX_LISTED,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_SALT,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    SamplingParams,
)

DEFAULT_TOKENS = 16  # OpenAI's
LARGEST = 2**31 - 1
REQUEST_ID = re.compile("[A-Za-z0-9._:-]{1,128}")
PROMPT = "a text, a list of texts, a list of token ids or a list of lists of token ids"


@dataclass(frozen=True)
class Prompt:
    """text: None if it was given as ids. offsets: where in the text each token begins."""

    ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request. Choice i of the answer continues prompt i // n.

    sampling: of the first choice; others have other seeds. seed: as it was asked for.
    """

    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    seed: int | None
    n: int
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    return_token_ids: bool
    ignore_eos: bool
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    tokens_as_ids: bool = False
    continuous_usage: bool = False
    request_id: str | None = None

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @cached_property
    def sequences(self) -> list[tuple[tuple[int, ...], SamplingParams]]:
        """The prompt and the parameters of every choice; hundreds take milliseconds."""
        seeds = [
            self.sampling.seed,
            *(_seed(self.seed, i % self.n) for i in range(1, self.choices)),
        ]
        each = (replace(self.sampling, seed=seed) for seed in seeds)
        return [(self.prompts[i // self.n].ids, params) for i, params in enumerate(each)]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(p.ids) for p in self.prompts)


def parse_request(
    fields: Fields, *, tokenizer: Any, capacity: int, most: int, eos_id: int | None = None
) -> CompletionRequest:
    """The request. capacity: tokens of a sequence. most: sequences of a request. eos_id: what an
    empty prompt stands for.

    Encodes the prompts, which may take a while. Raises ApiError.
    """
    check_fields(fields)
    n = fields.integer("n", 1, 1, most)
    if fields.integer("best_of", n, 1, most) not in (1, n):
        fields.wrong("best_of", f"1 or n = {n}")
    stream, echo = fields.boolean("stream"), fields.boolean("echo")
    options = fields.inner("stream_options")
    if fields.get("stream_options") is not None and not stream:
        fields.wrong("stream_options", "used with stream = true")
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    of_prompt = fields.integer("prompt_logprobs", None, 0, MAX_LOGPROBS)
    if of_prompt is not None and stream:
        fields.wrong("prompt_logprobs", "used without stream; echo with logprobs may be streamed")
    tokens = _wanted(fields, least=0 if echo else 1)
    prompts = _prompts(fields, tokenizer, most // n, eos_id)
    prompts = _truncated(fields, prompts, capacity - (tokens or 1))
    tokens = _max_tokens(fields, prompts, capacity, echo, tokens)
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    common = _rules(fields, tokenizer, tokens)
    ignore_eos = fields.boolean("ignore_eos")
    scores = tokens == 1 and logprobs is not None and not common["min_tokens"]
    wanted = [k for k in (logprobs, of_prompt, 0 if tokens == 0 else None) if k is not None]
    common |= {
        "max_tokens": tokens,
        "ignore_eos": ignore_eos or scores,  # Choice.add says why
        "logprobs": max(wanted, default=None),
        "prompt_logprobs": of_prompt is not None or (echo and bool(wanted)),
    }
    try:
        sampling = SamplingParams(seed=_seed(seed, 0), **common)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return CompletionRequest(
        prompts=prompts,
        sampling=sampling,
        seed=seed,
        n=n,
        echo=echo,
        logprobs=logprobs,
        stream=stream,
        include_usage=options.boolean("stream_options.include_usage"),
        return_token_ids=fields.boolean("return_token_ids"),
        ignore_eos=ignore_eos,
        prompt_logprobs=of_prompt,
        skip_special_tokens=common["skip_special_tokens"],
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
        continuous_usage=options.boolean("stream_options.continuous_usage_stats"),
        request_id=_request_id(fields),
    )


def _rules(fields: Fields, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """What is drawn and where the answer ends, as SamplingParams has it."""
    stop = fields.texts("stop", MAX_STOPS, MAX_STOP_LENGTH)
    if stop and tokenizer is None:
        fields.wrong("stop", "left out: the server has no tokenizer")
    allowed = None
    if fields.get("allowed_token_ids") is not None:
        allowed = tuple(dict.fromkeys(fields.integers("allowed_token_ids", MAX_LISTED)))
        if not allowed:
            fields.wrong("allowed_token_ids", f"a list of 1 to {MAX_LISTED} token ids")
    return {
        "temperature": fields.number("temperature", 1.0, 0.0, 2.0),
        "top_p": fields.number("top_p", 1.0, 1e-6, 1.0),
        "top_k": max(fields.integer("top_k", 0, -1, LARGEST), 0),  # vLLM: -1 = all
        "min_p": fields.number("min_p", 0.0, 0.0, 1.0),
        "presence_penalty": fields.number("presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 1e-3, 1e3),
        "logit_bias": fields.biases("logit_bias", MAX_LISTED, 100),
        "allowed_ids": allowed,
        "bad_words": _bad_words(fields, tokenizer),
        "min_tokens": fields.integer("min_tokens", 0, 0, tokens),
        "stop": stop,
        "stop_ids": fields.integers("stop_token_ids", MAX_STOPS),
        "include_stop": fields.boolean("include_stop_str_in_output"),
        "cache_salt": _salt(fields),
        "skip_special_tokens": fields.boolean("skip_special_tokens", True),
    }


def _bad_words(fields: Fields, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens as it stands, and behind a space where it does not begin with one."""
    words = fields.texts("bad_words", MAX_BAD_WORDS // 2, MAX_STOP_LENGTH)
    if words and tokenizer is None:
        fields.wrong("bad_words", "left out: the server has no tokenizer")
    rows: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word,) if word[0].isspace() else (word, f" {word}"):
            found = tokenizer.encode_batch([text], add_special_tokens=False)[0]
            if not _whole(tokenizer, text, found):
                fields.wrong("bad_words", f"texts that the tokenizer has; {shown(word)} is not one")
            rows[tuple(found.ids)] = None
    return tuple(rows)


def _whole(tokenizer: Any, text: str, found: Any) -> bool:
    """Whether tokens stand for all of a text: of one that a tokenizer drops in part, they would be
    those of other words."""
    covered = {at for start, end in found.offsets for at in range(start, end)}
    left = [c for at, c in enumerate(text) if at not in covered and not c.isspace()]
    broken = BROKEN in tokenizer.decode(found.ids) and BROKEN not in text
    return bool(found.ids) and not left and not broken


def _salt(fields: Fields) -> str:
    value = fields.get("cache_salt")
    if value is None:
        return ""
    allowed = f"a text of 1 to {MAX_SALT} characters"
    if not 0 < len(fields.text("cache_salt", value, allowed)) <= MAX_SALT:
        fields.wrong("cache_salt", allowed)
    return value


def _request_id(fields: Fields) -> str | None:
    value = fields.get("request_id")
    if value is not None and not (isinstance(value, str) and REQUEST_ID.fullmatch(value)):
        fields.wrong("request_id", "1 to 128 letters, digits and ._:-")
    return value


def _seed(seed: int | None, choice: int) -> int:
    """Of one of n choices: a given seed gives each of them again, and the next seed gives others
    (with seed + choice, the second choice of seed 5 would be the first of seed 6)."""
    if seed is None:
        return secrets.randbits(32)
    return number(seed % 2**32, SAMPLING, choice) if choice else seed % 2**32


def _prompts(fields: Fields, tokenizer: Any, most: int, eos_id: int | None) -> tuple[Prompt, ...]:
    value = fields.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and is_id(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        fields.wrong("prompt", PROMPT)
    if len(value) > most:
        fields.wrong("prompt", f"at most {most} prompts (prompts x n is limited)")
    return tuple(_prompt(fields, item, tokenizer, eos_id) for item in value)


def _prompt(fields: Fields, value: Any, tokenizer: Any, eos_id: int | None) -> Prompt:
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
    if prompt.ids:
        return prompt
    if eos_id is None or eos_id < 0:
        message = "prompt: is empty; must have at least one token: no end of sequence is known"
        raise ApiError(400, message, "prompt")
    return Prompt((eos_id,), "", (0,))  # what stands between documents, as with OpenAI


def _truncated(fields: Fields, prompts: tuple[Prompt, ...], room: int) -> tuple[Prompt, ...]:
    """Prompts cut to `truncate_prompt_tokens`; -1 = what is left beside the answer."""
    side = fields.one_of("truncation_side", "left", "left", "right")
    most = fields.integer("truncate_prompt_tokens", None, -1, LARGEST)
    if most is None:
        if fields.get("truncation_side") is not None:
            fields.wrong("truncation_side", "used with truncate_prompt_tokens")
        return prompts
    if most == 0:
        fields.wrong("truncate_prompt_tokens", "-1 or at least 1")
    most = max(1, room) if most < 0 else most
    return tuple(_cut(prompt, most, side) for prompt in prompts)


def _cut(prompt: Prompt, most: int, side: str) -> Prompt:
    """The last `most` tokens of a prompt ("left" is cut off), or the first, with their text."""
    count = len(prompt.ids)
    if count <= most:
        return prompt
    first, last = (count - most, count) if side == "left" else (0, most)
    ids = prompt.ids[first:last]
    if prompt.text is None:
        return Prompt(ids)
    begin = prompt.offsets[first] if first else 0
    end = prompt.offsets[last] if last < count else len(prompt.text)
    offsets = tuple(at - begin for at in prompt.offsets[first:last])
    return Prompt(ids, prompt.text[begin:end], offsets)


def _wanted(fields: Fields, least: int) -> int | None:
    """`max_tokens`, or `max_completion_tokens`, its newer name, before the prompts are known."""
    tokens = fields.integer("max_tokens", None, least, LARGEST)
    newer = fields.integer("max_completion_tokens", None, least, LARGEST)
    if None not in (tokens, newer) and tokens != newer:
        fields.wrong("max_completion_tokens", f"the same as max_tokens = {tokens}")
    return newer if tokens is None else tokens


def _max_tokens(
    fields: Fields, prompts: tuple[Prompt, ...], capacity: int, echo: bool, tokens: int | None
) -> int:
    """`_wanted`, checked against what the longest prompt leaves."""
    least, longest = 0 if echo else 1, max(len(p.ids) for p in prompts)
    if longest + least > capacity:
        message = f"prompt: has {longest} tokens; must be from 1 to {capacity - least}"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    if tokens is None:  # the default is no wish: it must not refuse a prompt that fits
        return max(min(DEFAULT_TOKENS, capacity - longest), least)
    if longest + tokens > capacity:
        allowed = (
            f"from {least} to {capacity - longest}: a sequence has at most {capacity} tokens,"
            f" {longest} of them are the prompt's"
        )
        given = "max_completion_tokens" if fields.get("max_tokens") is None else "max_tokens"
        fields.wrong(given, allowed, "context_length_exceeded")
    return tokens
