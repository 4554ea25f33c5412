"""The hash for serving: canonical ids and addresses of a few tokens at a time.

It uses numba's loop where numba is installed (extra `serve`), else NumPy: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engram_jax.addressing import hash_numpy
from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.fgrams import FgramAddressing
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.config.extras import installed


class Hasher:
    """Tokens of running sequences -> canonical ids and addresses, for all Engram layers.

    A sequence's history is int32 [N - 1], its last canonical ids, oldest first. It serves all
    layers, which share fill id, restart id and N. signed: whether rows are read with `signs`.
    """

    def __init__(self, addressing: Addressing):
        self.layers = {str(i): layer for i, layer in addressing.layers.items()}
        self._compression = addressing.compression
        self.signed = addressing.signs
        self._first = next(iter(addressing.layers.values()))
        self.past = self._first.max_ngram - 1
        self._addresses = {k: _addresser(layer) for k, layer in self.layers.items()}

    def empty(self) -> np.ndarray:
        """The history of a sequence that has not begun."""
        return hash_numpy.empty_history(self._first)

    def canonical(self, tokens: np.ndarray) -> np.ndarray:
        """Raw ids [...] -> canonical ids int32; -1 (no memory) beyond the tokenizer's, as on the
        device (hash_jax.canonicalise)."""
        if self._compression is None:
            return np.asarray(tokens, np.int32)
        size = len(self._compression)
        known = (tokens >= 0) & (tokens < size)
        found = self._compression[np.where(known, tokens, 0)]
        return np.where(known, found, np.minimum(tokens, -1)).astype(np.int32)

    def signs(self, layer: str, ids: np.ndarray) -> np.ndarray:
        """As `addresses`, the signs that the rows are read with: int8 [B, S, H]."""
        past, own = self.past, self.layers[layer]
        assert isinstance(own, LayerAddressing)  # f-grams have none (config/validate.py)
        return hash_numpy.signs(ids[:, past:], own, history=ids[:, :past])

    def addresses(self, layer: str, ids: np.ndarray) -> np.ndarray:
        """ids: histories and new canonical ids side by side, int32 [B, N - 1 + S] -> [B, S, H]."""
        return self._addresses[layer](ids)


def _addresser(layer: LayerAddressing | FgramAddressing) -> Callable[[np.ndarray], np.ndarray]:
    """The function int32 [B, N - 1 + S] -> int32 [B, S, H] of a layer, compiled if possible."""
    if not isinstance(layer, FgramAddressing) and installed("numba"):
        from engram_jax.addressing import hash_numba

        return hash_numba.addresser(layer)
    past = layer.max_ngram - 1

    def by_numpy(ids: np.ndarray) -> np.ndarray:
        found = hash_numpy.addresses(ids[:, past:], layer, history=ids[:, :past])
        return found.astype(np.int32)

    return by_numpy
