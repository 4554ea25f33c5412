"""The log-probabilities of prompts: which a step must compute, and their lists for the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_jax.serve.engine_steps import Logprobs
from engram_jax.serve.request import MAX_NEXT, Logprob
from engram_jax.serve.scheduler import Sequence as Running


def is_scored(s: Running, count: int) -> bool:
    """Whether its next `count` tokens predict one of the prompt whose log-probability is asked."""
    last = min(s.computed + count, len(s.prompt) - 1)
    return s.params.prompt_logprobs and last >= s.params.prompt_logprobs_from


def targets(shape: tuple[int, int], rows: Sequence[tuple[int, Running, int]]) -> np.ndarray:
    """int32 `shape`: the token behind each of those that a step computes of prompts; 0 where there
    is none. rows: (row, sequence, tokens)."""
    found = np.zeros(shape, np.int32)
    for row, sequence, _ in rows:
        part = sequence.prompt[sequence.computed + 1 :][: shape[1]]
        found[row, : len(part)] = part
    return found


def listed(scored: Sequence[Running], most: int) -> int:
    """How many of the likeliest tokens a step must find: 1 or `most`. Two programs at most; sorting
    a vocabulary takes longer than finding its largest."""
    return 1 if all((s.params.logprobs or 0) <= 1 for s in scored) else most


def next_ids(size: int, rows: Sequence[tuple[int, Running]]) -> np.ndarray | None:
    """int32 [size, MAX_NEXT]: tokens that may follow the prompts that a step has computed to their
    ends; None if nobody asks. rows: (row, sequence)."""
    ends = [(row, s.params.next_ids) for row, s in rows if not (s.prefilling or s.generated)]
    if not any(ids for _, ids in ends):
        return None
    found = np.zeros((size, MAX_NEXT), np.int32)
    for row, ids in ends:
        found[row, : len(ids)] = ids
    return found


def add_prompt(s: Running, fed: Any, row: int, start: int, count: int) -> None:
    """Keep what a step has found (Logprobs, as NumPy's arrays): `count` tokens of the prompt were
    computed behind `start`."""
    first = max(start + 1, s.params.prompt_logprobs_from)
    following = s.prompt[first : start + 1 + count]
    skipped = first - start - 1
    at, most = (row, slice(skipped, skipped + len(following))), s.params.logprobs or 0
    s.prompt_logprobs.add(following, fed.chosen[at], fed.ids[at][:, :most], fed.top[at][:, :most])


def add_next(s: Running, own: Logprobs, values: np.ndarray, row: int) -> None:
    """Keep the log-probabilities [B, MAX_NEXT] of `next_ids`; own: of the token that was drawn."""
    tokens, most = np.asarray(s.params.next_ids, np.int32), s.params.logprobs or 0
    ids, top = (np.broadcast_to(a[row, :most], (len(tokens), most)) for a in (own.ids, own.top))
    s.prompt_logprobs.add(tokens, values[row, : len(tokens)], ids, top)


def one(token: int, found: Logprobs, at: tuple[int, ...], alternatives: int | None) -> Logprob:
    """A token's, found at the index `at`."""
    count = alternatives or 0
    top = zip(found.ids[at][:count].tolist(), found.top[at][:count].tolist(), strict=True)
    return Logprob(token, float(found.chosen[at]), dict(top))
