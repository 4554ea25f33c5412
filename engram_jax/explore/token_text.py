"""How tokens, canonical ids and n-grams are shown: text where there is any, bytes where not."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from engram_jax.addressing import compression, tokenizer_size
from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.detokenizer import bytes_of, text_of

SAME = 6  # tokens that are shown of those that share a canonical id
Shown = dict[str, Any]


class TokenText:
    """Of one tokenizer and addressing. What is shown is {"text": ...}, or {"bytes": "e2 82"} of a
    token that is a part of a character, or {"text": ""} of an id that is no token."""

    def __init__(self, tokenizer: Any, addressing: Addressing):
        self._tokenizer, self._compression = tokenizer, addressing.compression
        self._pad = addressing.pad_id

    def raw(self, token: int, inside: bool = True) -> Shown:
        """A raw id. inside: after other text."""
        if (data := bytes_of(self._tokenizer, token)) is not None:
            return {"bytes": data.hex(" ")}
        return {"text": text_of(self._tokenizer, token, inside)}

    def canonical(self, token: int) -> Shown:
        """What the tokens of a canonical id have in common."""
        members = self.members(token)
        if not len(members):
            return {"text": ""}
        shown = self.raw(int(members[0]))
        return shown if "bytes" in shown else {"text": self._keys[members[0]]}

    def members(self, token: int) -> np.ndarray:
        """The raw ids of a canonical id, ascending."""
        if self._compression is None:
            return np.array([token] if 0 <= token < len(self._keys) else [], np.int64)
        places = np.searchsorted(self._ordered, [token, token + 1])
        return self._by_canonical[slice(*places)]

    @cached_property
    def _keys(self) -> list[str]:
        if self._compression is None:
            return [text_of(self._tokenizer, i) for i in range(tokenizer_size(self._tokenizer))]
        return compression.canonical_keys(self._tokenizer)

    @cached_property
    def _by_canonical(self) -> np.ndarray:
        return np.argsort(self._compression, kind="stable")  # type: ignore[arg-type]

    @cached_property
    def _ordered(self) -> np.ndarray:
        return self._compression[self._by_canonical]  # type: ignore[index]
