"""Refuses a request by its size before work is spent on it: bytes of prompts, numbers of an answer.

Both are known from the request alone. docs/serving.md states the limits for users.
"""

from __future__ import annotations

import re
from typing import NoReturn

from engram_jax.serve.http.completion_request import CompletionRequest
from engram_jax.serve.http.json_fields import ApiError, Fields

BYTES_PER_TOKEN = 64  # of a prompt's text, on average; a token of ordinary text has 3 to 5
# The beginning of a text in a body. No backslash before: in JSON, this can only be the key itself.
_PROMPT = re.compile(rb'(?<!\\)"prompt"[ \t\n\r]*:[ \t\n\r]*(?:\[[ \t\n\r]*)?"')


def check_body(body: bytes, capacity: int) -> None:
    """Refuse the first text of `prompt` if it is too long, before its JSON is read: that takes two
    milliseconds a megabyte, in which no other thread runs. Raises ApiError.

    Only what `check_prompt_sizes` would refuse. An escape is at most five bytes longer than what it
    stands for, and has at least one backslash.
    """
    most = BYTES_PER_TOKEN * capacity
    if len(body) > most and (found := _PROMPT.search(body)):
        begin = found.end()
        end = body.find(b'"', begin)  # perhaps an escaped one, and the text goes on
        escapes = body.count(b"\\", begin, max(end, begin))
        if (size := end - begin - 5 * escapes) > most:
            _text_too_long(size, capacity, exact=not escapes)


def check_prompt_sizes(fields: Fields, capacity: int) -> None:
    """Refuse prompts that are too long whatever the tokenizer makes of them. Raises ApiError.

    A text may have `BYTES_PER_TOKEN` bytes for every token of a sequence; a list of ids is as long
    as it is, unless it is to be cut. Values of other types are left to the parser.
    """
    cut = fields.get("truncate_prompt_tokens") is not None
    given = fields.get("prompt")
    several = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
    most = BYTES_PER_TOKEN * capacity
    for prompt in given if several else [given]:
        if isinstance(prompt, list) and len(prompt) > capacity and not cut:
            _too_long(f"prompt: has {len(prompt)} tokens; must be from 1 to {capacity}")
        if isinstance(prompt, str):
            exact = prompt.isascii() or len(prompt) <= most  # else it need not be encoded
            size = len(prompt.encode("utf-8", "replace")) if exact else len(prompt)
            if size > most:
                _text_too_long(size, capacity, exact)


def _text_too_long(size: int, capacity: int, exact: bool) -> NoReturn:
    _too_long(
        f"prompt: has {'' if exact else 'at least '}{size} bytes; must have at most"
        f" {BYTES_PER_TOKEN * capacity}, {BYTES_PER_TOKEN} for each of the {capacity} tokens of a"
        " sequence"
    )


def _too_long(message: str) -> NoReturn:
    raise ApiError(400, message, "prompt", "context_length_exceeded")


def listed_numbers(request: CompletionRequest) -> int:
    """The most tokens and log-probabilities that a request's answer can list.

    A token of an answer is one, and with `logprobs` = k each has k + 1 log-probabilities; with
    `echo` or log-probabilities of the prompt a choice also has its prompt's.
    """
    params = request.sampling
    tokens = params.max_tokens * request.choices
    if request.echo or params.prompt_logprobs:
        tokens += request.n * request.prompt_tokens
    return tokens * (1 if params.logprobs is None else params.logprobs + 2)


def check_answer_size(request: CompletionRequest, most: int) -> int:
    """Refuse a request whose answer could list more than `most` numbers; how many it could list.
    Raises ApiError."""
    numbers = listed_numbers(request)
    if numbers > most:
        params = request.sampling
        both = request.echo or params.prompt_logprobs
        parts = [f"{request.choices} choices"]
        parts += ["tokens of prompt and answer" if both else "max_tokens"]
        parts += [] if params.logprobs is None else [f"logprobs + 2 = {params.logprobs + 2}"]
        raise ApiError(
            400,
            f"the answer could list {numbers} tokens and log-probabilities ({' x '.join(parts)}):"
            f" must be at most {most} (config.serve.max_answer)",
            code="answer_too_large",
        )
    return numbers
