"""The hash as a serving engine runs it: `hashing`'s addresses of a few tokens, in microseconds.

NumPy pays for every call, a step of decoding has a hundred numbers. One loop, compiled by numba,
with `hashing`'s int64 arithmetic as it stands there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.hash_numpy import empty_history
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.hardware.numba_jit import host_jit


@host_jit
def _addresses(ids, past, fill, restart, multipliers, orders, per_order, sizes, offsets, out):  # type: ignore[no-untyped-def]
    """ids int32 [B, past + S], out int32 [B, S, H]. restart: an id, or a number that is none."""
    for b in range(out.shape[0]):
        for s in range(out.shape[1]):
            mix = np.int64(0)
            inside = True
            head = 0
            for k in range(past + 1):
                x = np.int64(ids[b, s + past - k])
                if k > 0:
                    inside = inside and x != restart
                    if not inside:
                        x = np.int64(fill)
                mix ^= x * multipliers[k]
                for order in orders:
                    if order == k + 1:
                        for _ in range(per_order):
                            out[b, s, head] = mix % sizes[head] + offsets[head]
                            head += 1


class Hasher:
    """Tokens of running sequences -> canonical ids and addresses, for all Engram layers.

    A sequence's history is int32 [N - 1], its last canonical ids, oldest first. All layers of a
    plan share what a history is (fill id, restart id, N).
    """

    def __init__(self, addressing: Addressing):
        self.layers = {str(i): layer for i, layer in addressing.layers.items()}
        self._compression = addressing.compression
        self._first = next(iter(addressing.layers.values()))
        self.past = self._first.max_ngram - 1
        self._numbers = {k: _numbers(layer) for k, layer in self.layers.items()}

    def empty(self) -> np.ndarray:
        """The history of a sequence that has not begun."""
        return empty_history(self._first)

    def canonical(self, tokens: np.ndarray) -> np.ndarray:
        """Raw ids [...] -> canonical ids int32; -1 (no memory) beyond the tokenizer's, as on the
        device (hash_jax.canonicalise)."""
        if self._compression is None:
            return np.asarray(tokens, np.int32)
        size = len(self._compression)
        known = (tokens >= 0) & (tokens < size)
        found = self._compression[np.where(known, tokens, 0)]
        return np.where(known, found, np.minimum(tokens, -1)).astype(np.int32)

    def addresses(self, layer: str, ids: np.ndarray) -> np.ndarray:
        """ids: histories and new canonical ids side by side, int32 [B, N - 1 + S] -> [B, S, H]."""
        heads = self.layers[layer].heads
        out = np.empty((len(ids), ids.shape[1] - self.past, heads), np.int32)
        given: Any = (np.ascontiguousarray(ids), self.past, *self._numbers[layer], out)
        _addresses(*given)
        return out


def _numbers(layer: LayerAddressing) -> tuple:
    def int64(values: tuple[int, ...]) -> np.ndarray:
        return np.array(values, np.int64)

    none = np.int64(-(2**62))
    return (
        np.int64(layer.fill_id),
        none if layer.restart_id is None else np.int64(layer.restart_id),
        int64(layer.multipliers),
        int64(layer.orders),
        layer.heads_per_order,
        int64(layer.head_sizes),
        int64(layer.offsets),
    )
