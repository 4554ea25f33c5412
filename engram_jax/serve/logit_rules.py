"""What a sequence's parameters change in its logits: entries by token, kept on the host.

Every generated token is known to the host before the next one is drawn (serve/engine.py), so the
tokens that a rule touches are listed here and only they are changed on the device
(model/sampling.py: adjust_logits). A step in which a sequence has rules takes 16 bytes times
`entries` for every row of the batch to the device, and draws a second time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from engram_jax.config.errors import UserError
from engram_jax.serve.request import MAX_BAD_WORDS, MAX_LISTED, MAX_STOPS, SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adjustments:
    """The rules of a batch: ids int32 [B, K]; bias, factor, less float32 [B, K]; only bool [B]; all
    as `adjust_logits` takes them. used: bool [B], rows that have rules. min_p: float32 [B]."""

    ids: Any
    bias: Any
    factor: Any
    less: Any
    only: Any
    used: Any
    min_p: Any


def entries(capacity: int, vocab: int) -> int:
    """K: the most tokens that a sequence's rules touch. capacity: tokens of a sequence."""
    return min(vocab, capacity + MAX_LISTED + MAX_BAD_WORDS + MAX_STOPS + 1)


def ends_of(params: SamplingParams, eos_id: int | None) -> set[int]:
    """The tokens that end a sequence."""
    eos = set() if eos_id is None or eos_id < 0 or params.ignore_eos else {eos_id}
    return eos | set(params.stop_ids)


def check_rules(
    params: SamplingParams, eos_id: int | None, vocab: int, drawable: np.ndarray | None = None
) -> None:
    """Raises UserError for ids that do not exist, and for rules that may leave no token.

    drawable: bool [vocab], the ids that the tokenizer has; None = all.
    """
    named: dict[str, Collection[int]] = {
        "allowed_token_ids": params.allowed_ids or (),
        "bad_words": [token for row in params.bad_words for token in row],
        "logit_bias": [token for token, _ in params.logit_bias],
        "stop_token_ids": params.stop_ids,
    }
    for name, ids in named.items():
        if bad := [token for token in ids if not 0 <= token < vocab]:
            raise UserError(f"{name}: token id {bad[0]}: must be from 0 to {vocab - 1}")
        if drawable is not None and (bad := [token for token in ids if not drawable[token]]):
            raise UserError(
                f"{name}: token id {bad[0]}: must be an id of the tokenizer, which has none there"
            )
    there = vocab if drawable is None else int(drawable.sum())
    for before in {(), *(row[:-1] for row in params.bad_words)}:
        never = _completing(params, before)
        never |= ends_of(params, eos_id) if params.min_tokens else set()
        allowed = params.allowed_ids
        if len(never) >= there if allowed is None else never.issuperset(allowed):
            raise UserError(
                "allowed_token_ids: must have a token that bad_words and min_tokens always allow"
            )


def _completing(params: SamplingParams, generated: Sequence[int]) -> set[int]:
    """The tokens that would complete one of `bad_words` behind the generated ones."""
    rows, count = params.bad_words, len(generated)
    return {
        row[-1]
        for row in rows
        if len(row) <= count + 1 and tuple(generated[count + 1 - len(row) :]) == row[:-1]
    }


class LogitRules:
    """The rules of one sequence. Raises nothing for parameters that `check_rules` has seen."""

    def __init__(self, params: SamplingParams, prompt: np.ndarray, eos_id: int | None, most: int):
        """most: `entries`."""
        self._params, self._most = params, most
        self._place: dict[int, int] = {}
        self._ids = np.zeros(most, np.int32)
        self._bias, self._less = np.zeros(most, np.float32), np.zeros(most, np.float32)
        self._factor = np.ones(most, np.float32)
        self._counts: dict[int, int] = {}
        self._seen = 0  # generated tokens
        self._only = None if params.allowed_ids is None else frozenset(params.allowed_ids)
        self._ends = ends_of(params, eos_id) if params.min_tokens else set()
        for token in params.allowed_ids or ():
            self._at(token)
        for token, value in params.logit_bias:
            if (at := self._at(token)) is not None:
                self._bias[at] = value
        if params.repetition_penalty != 1:
            for token in set(prompt.tolist()):
                self._repeats(token)

    def _at(self, token: int) -> int | None:
        """The token's entry; None if it is not drawn anyway."""
        if self._only is not None and token not in self._only:
            return None
        if token not in self._place:
            self._ids[len(self._place)] = token
            self._place[token] = len(self._place)
        return self._place[token]

    def _repeats(self, token: int) -> int | None:
        if (at := self._at(token)) is not None:
            self._factor[at] = self._params.repetition_penalty
        return at

    def fill(self, row: int, into: Adjustments, generated: Sequence[int]) -> None:
        """Write the entries for the token after `generated` (all of it, each time) to a row."""
        params = self._params
        if params.penalises:
            for token in generated[self._seen :]:
                count = self._counts[token] = self._counts.get(token, 0) + 1
                if (at := self._repeats(token)) is not None:
                    self._less[at] = params.frequency_penalty * count + params.presence_penalty
        self._seen = len(generated)
        banned = [at for token in self._never(generated) if (at := self._at(token)) is not None]
        count = len(self._place)
        into.ids[row, :count] = self._ids[:count]
        into.bias[row, :count] = self._bias[:count]
        into.bias[row, banned] = -np.inf
        into.factor[row, :count] = self._factor[:count]
        into.less[row, :count] = self._less[:count]
        into.only[row], into.used[row] = self._only is not None, True
        into.min_p[row] = params.min_p

    def _never(self, generated: Sequence[int]) -> set[int]:
        """The tokens that must not come next."""
        ends = self._ends if len(generated) < self._params.min_tokens else set()
        return _completing(self._params, generated) | ends


def no_adjustments(rows: int, most: int, vocab: int) -> Adjustments:
    """Of a batch without rules, in NumPy, to be filled."""
    floats = (np.zeros((rows, most), np.float32) for _ in range(2))
    return Adjustments(
        ids=np.full((rows, most), vocab, np.int32),
        bias=next(floats),
        factor=np.ones((rows, most), np.float32),
        less=next(floats),
        only=np.zeros(rows, bool),
        used=np.zeros(rows, bool),
        min_p=np.zeros(rows, np.float32),
    )
