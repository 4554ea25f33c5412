"""What the device holds of the sequences from step to step, and copies of parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.model.program import Weights
from engram_jax.serve.engine_steps import EngineSteps

# Of an evicted sequence: its used pages, and the tails of the convolutions.
Saved = tuple[np.ndarray, Any]


class DeviceState:
    """cache: of the running sequences; each step replaces it. Beside it are the convolutions' tails
    behind the beginnings of prompts that are kept (serve/prefixes.py)."""

    def __init__(self, steps: EngineSteps, weights: Weights, replicated: NamedSharding):
        self._steps, self._replicated = steps, replicated
        self.cache = steps.fresh(weights)
        self._kept = steps.fresh_kept(weights)

    # Eviction: swapping out and in

    def take_out(self, slot: int, pages: Sequence[int], used: int) -> Saved:
        """The state of the sequence in a slot, on the host. used: of its pages, from the first."""
        kept, tails = self._steps.swap_out(self.cache, np.int32(slot), self._padded(pages))
        return np.asarray(kept)[:, :used].copy(), jax.device_get(tails)

    def put_back(self, slot: int, pages: Sequence[int], saved: Saved, token: int) -> None:
        """The inverse, for the same or another slot and pages. token: the last one drawn."""
        used, tails = saved
        shape = (used.shape[0], self._steps.pages_each, *used.shape[2:])
        kept = np.zeros(shape, used.dtype)
        kept[:, : used.shape[1]] = used
        self.cache = self._steps.swap_in(
            self.cache, np.int32(slot), self._padded(pages), (kept, tails), np.int32(token)
        )

    def _padded(self, pages: Sequence[int]) -> np.ndarray:
        """int32 [n]: the pages, then a page number out of range."""
        padded = np.full(self._steps.pages_each, self._steps.page_count, np.int32)
        padded[: len(pages)] = pages
        return padded

    # Beginnings of prompts that are shared

    def keep_tails(self, pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: (slot, row of the kept tails that it is copied to), at most
        `serve.prefill_sequences` of them."""
        size, units = self._steps.serve.prefill_sequences, self._steps.units
        slots, rows = self._columns(pairs, size, (0, units))
        self._kept = self._steps.keep(self._kept, self.cache, slots, rows)

    def restore_tails(self, pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: (slot, row that is copied to it), at most `serve.sequences` of them."""
        size = self._steps.serve.sequences
        slots, rows = self._columns(pairs, size, (size, 0))
        self.cache = self._steps.restore(self.cache, self._kept, slots, rows)

    def _columns(
        self, pairs: Sequence[tuple[int, int]], size: int, unused: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """int32 [size] each, the pairs and then `unused` ones, which the program drops."""
        filled = np.full((size, 2), unused, np.int32)
        for i, pair in enumerate(pairs):
            filled[i] = pair
        return jax.device_put((filled[:, 0], filled[:, 1]), self._replicated)
