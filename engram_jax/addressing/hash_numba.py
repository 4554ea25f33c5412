"""The hash as one loop compiled by numba: addresses of a few tokens, in microseconds.

A step of decoding has a hundred numbers, too few for NumPy's cost per call. The int64 arithmetic is
`hash_numpy`'s. It needs the extra `serve`; `hash_tokens` imports it where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.hardware.numba_internals import host_jit


def addresser(layer: LayerAddressing) -> Callable[[np.ndarray], np.ndarray]:
    """A function of histories and new canonical ids side by side, int32 [B, N - 1 + S], to the
    new ids' addresses, int32 [B, S, H]."""
    past, heads, numbers = layer.max_ngram - 1, layer.heads, _numbers(layer)

    def addresses(ids: np.ndarray) -> np.ndarray:
        out = np.empty((len(ids), ids.shape[1] - past, heads), np.int32)
        given: Any = (np.ascontiguousarray(ids), past, *numbers, out)
        _addresses(*given)
        return out

    return addresses


@host_jit
def _addresses(ids, past, fill, restart, multipliers, orders, per_order, sizes, offsets, out):  # type: ignore[no-untyped-def]
    """ids int32 [B, past + S], out int32 [B, S, H]. restart: an id, or a number that is no id."""
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
