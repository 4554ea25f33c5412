"""LongPPL's key tokens: those that a model predicts well with a long context alone.

Fang et al., "What is Wrong with Perplexity for Long-context Language Modeling?", arXiv 2410.23771,
and the code published with it (github.com/PKU-ML/LongPPL). With l the log-likelihood of a
token (nats) under the evaluator, given its whole text and given a truncated context:

    key  <=>  l(whole) - l(truncated) > 2  and  l(whole) > -2

Truncated contexts slide: the first token that can be key is number K of its text (from 0); from it
on, `stride` tokens each share one start, and have K to K + stride - 1 tokens before them. The
published lengths are K = 4,096 and a stride of 1,024, for texts of at most 32,768 tokens.

Key tokens become text: the characters that they are made of, neighbours joined. Of another model's
tokens those are key that lie in this text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

GAIN, LIKELIHOOD = 2.0, -2.0
CONTEXT, TRUNCATED, STRIDE = 32_768, 4_096, 1_024  # as published, tokens


@dataclass(frozen=True)
class Rule:
    """Lengths in tokens. context: of a whole text, at most. truncated: K."""

    context: int
    truncated: int
    stride: int


class Part(NamedTuple):
    """Tokens [start, end) of a text, of which those from `first` on are predicted."""

    start: int
    end: int
    first: int


def short_parts(length: int, rule: Rule) -> list[Part]:
    """What is read with a truncated context of a text of `length` tokens; the last may be
    shorter. Each of the text's tokens from number K on is predicted once."""
    return [
        Part(start, min(start + rule.truncated + rule.stride, length), start + rule.truncated)
        for start in range(0, length - rule.truncated, rule.stride)
    ]


def key_tokens(whole: np.ndarray, truncated: np.ndarray) -> np.ndarray:
    """bool [n]: which tokens are key, from their losses (nats) with both contexts, float64 [n]."""
    return (truncated - whole > GAIN) & (-whole > LIKELIHOOD)


def spans_of(offsets: np.ndarray) -> np.ndarray:
    """The text of tokens, int64 [spans, 2], ascending; offsets: int64 [n, 2], the characters of
    each, ascending. Tokens that touch are one span."""
    if not len(offsets):
        return np.zeros((0, 2), np.int64)
    until = np.maximum.accumulate(offsets[:, 1])
    apart = np.append(True, offsets[1:, 0] > until[:-1])
    return np.stack([offsets[apart, 0], until[np.append(apart[1:], True)]], axis=1)


def inside(offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """bool [n]: which tokens lie in the spans as a whole. Arguments as of `spans_of`."""
    if not len(spans):
        return np.zeros(len(offsets), bool)
    at = np.searchsorted(spans[:, 0], offsets[:, 0], side="right") - 1
    return (at >= 0) & (offsets[:, 1] <= spans[np.maximum(at, 0), 1])


@dataclass(frozen=True)
class Encoded:
    """A text's tokens. ids: int32 [n]. offsets: int64 [n, 2], the characters of each."""

    ids: np.ndarray
    offsets: np.ndarray


Encode = Callable[[str], Encoded]


def cut(text: str, encoders: Sequence[Encode], context: int) -> Iterator[str]:
    """A document in consecutive texts, of at most `context` tokens of each tokenizer, and as many
    as can be; one at a time."""
    start = 0
    while start < len(text):
        taken = _first(text, start, encoders, context)
        yield text[start : start + taken]
        start += taken


def _first(text: str, start: int, encoders: Sequence[Encode], context: int) -> int:
    """Characters of the first text."""
    window = 8 * context
    while True:  # until the window has more tokens than wanted, or is all that there is
        size = min(window, len(text) - start)
        rest = text[start : start + size]
        if size == len(text) - start or all(len(e(rest).ids) > context for e in encoders):
            break
        window *= 2
    while True:  # what is cut off may change the tokens before it
        over = [e for e in (encode(rest) for encode in encoders) if len(e.ids) > context]
        if not over:
            return len(rest)
        shorter = min(int(encoded.offsets[context - 1, 1]) for encoded in over)
        rest = rest[: max(1, min(shorter, len(rest) - 1))]
