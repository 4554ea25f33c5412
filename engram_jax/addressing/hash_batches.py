"""The hash for the data pipeline: `hash_numpy`'s addresses of a whole batch, faster.

NumPy vectorises division by a constant but not its remainder, so each head costs one floor
division, one multiply and two adds on an int64 block that stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.fgrams import FgramAddressing, find
from engram_jax.addressing.hash_numpy import canonicalise, lookback, mixes
from engram_jax.addressing.hash_plan import LayerAddressing

_BLOCK = 8192  # positions; 64 KiB of int64


@dataclass(frozen=True)
class BatchAddresser:
    """Raw tokens of a batch -> addresses of every Engram layer. Picklable, for Grain's workers."""

    addressing: Addressing

    def __call__(
        self, tokens: np.ndarray, segments: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """{str(layer id): int32 [..., T, H] flat rows}.

        tokens: raw ids [..., T]. segments: document numbers [..., T], None = one document.
        Raises UserError for a token id that the tokenizer does not have.
        """
        canonical = canonicalise(tokens, self.addressing.compression)
        layers = self.addressing.layers
        # Layers differ in their multipliers and primes, hardly ever in the ids they hash.
        windows = {_window(layer): layer for layer in layers.values()}
        ids = {key: lookback(canonical, layer, segments) for key, layer in windows.items()}
        return {str(i): _addresses(ids[_window(layer)], layer) for i, layer in layers.items()}


def _window(layer: LayerAddressing | FgramAddressing) -> tuple[int, int, int | None]:
    """The fields of a layer that `lookback` depends on."""
    return layer.max_ngram, layer.fill_id, layer.restart_id


def _addresses(ids: list[np.ndarray], layer: LayerAddressing | FgramAddressing) -> np.ndarray:
    """`hash_numpy.addresses` from `lookback`'s ids, as int32."""
    if isinstance(layer, FgramAddressing):
        return find(ids, layer)
    hashed = [h.reshape(-1) for h in mixes(ids, layer)]
    size = ids[0].size
    out = np.empty((size, layer.heads), np.int32)
    for start in range(0, size, _BLOCK):
        block = slice(start, start + _BLOCK)
        for head, (prime, offset) in enumerate(zip(layer.head_sizes, layer.offsets, strict=True)):
            h = hashed[head // layer.heads_per_order][block]
            flat = h // prime
            flat *= -prime
            flat += h
            flat += offset
            out[block, head] = flat
    return out.reshape(*ids[0].shape, layer.heads)
