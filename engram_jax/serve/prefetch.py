"""Decides when rows are fetched: tokens are hashed once known, rows fetched before their use.

The fetch overlaps with the blocks before the rows' Engram layer. Layers are requested in the order
in which they are needed. All waiting for rows is counted, and separately the waiting that matters:
when the device had run out of work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.addressing.hash_tokens import Hasher
from engram_jax.config.errors import UserError
from engram_jax.model.program import Program
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.row_fetch import DeviceMemory, LayerMemory
from engram_jax.serve.scheduler import Sequence as Running

# Row of the batch, the sequence, and how many of the row's tokens are real.
Rows = Sequence[tuple[int, Running, int]]
THREADS = 2


@dataclass
class Asked:
    """The requested rows of one batch.

    canonical: int32 [B, N - 1 + S], histories and new ids. real: bool [B, S], False is padding.
    futures: by Engram layer id; a table on the device returns its rows at once. signs: int8
    [B, S, H], with which they are read, if they are.
    """

    canonical: np.ndarray
    real: np.ndarray
    addresses: dict[str, np.ndarray] = field(default_factory=dict)
    futures: dict[str, Future | jax.Array] = field(default_factory=dict)
    signs: dict[str, np.ndarray] = field(default_factory=dict)


class Prefetch:
    """Fetches from all tables of a model. memory: by Engram layer id, of the layers that are on."""

    def __init__(self, program: Program, memory: Mapping[str, LayerMemory], steps: EngineSteps):
        layers = program.addressing.layers if program.addressing is not None else {}
        on = [str(layer) for layer in layers if not steps.serve.is_off(layer)]
        if missing := [layer for layer in on if layer not in memory]:
            raise ValueError(f"no memory for Engram layers {', '.join(missing)}")
        self.memory = {layer: memory[layer] for layer in on}
        self._hasher = Hasher(program.addressing) if program.addressing and layers else None
        self._dim = program.config.model.engram.dim
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="rows")
        self._waits = {"waits": 0, "wait_seconds": 0.0, "late": 0, "late_seconds": 0.0}
        self._waits["read_errors"] = 0
        self.error = ""  # the last read error

    def empty_history(self) -> np.ndarray:
        """The n-gram history of a sequence that has not begun, int32 [N - 1]."""
        return np.zeros(0, np.int32) if self._hasher is None else self._hasher.empty()

    def ask(self, tokens: np.ndarray, rows: Rows) -> Asked:
        """Start fetching the rows of all layers. tokens: int32 [B, S], of which `rows` are real."""
        hasher, past = self._hasher, len(self.empty_history())
        canonical = np.zeros((len(tokens), past + tokens.shape[1]), np.int32)
        real = np.zeros(tokens.shape, bool)
        for row, _, count in rows:
            real[row, :count] = True
        asked = Asked(canonical, real)
        if hasher is None or not rows:
            return asked
        canonical[:, past:] = hasher.canonical(tokens)
        for row, sequence, _ in rows:
            canonical[row, :past] = sequence.history
        whole = bool(real.all())
        for layer, memory in self.memory.items():
            addresses = hasher.addresses(layer, canonical)
            if not whole:  # padding repeats a row that is read anyway
                addresses[~real] = addresses[rows[0][0], 0]
            asked.addresses[layer] = addresses
            if hasher.signed:
                asked.signs[layer] = hasher.signs(layer, canonical)
            if isinstance(memory, DeviceMemory):
                asked.futures[layer] = memory.fetch(addresses, real)
            else:
                asked.futures[layer] = self._pool.submit(memory.fetch, addresses, real)
        return asked

    def advance(self, asked: Asked, rows: Rows) -> None:
        """Append the requested tokens to the sequences' histories, once they are computed."""
        past = len(self.empty_history())
        for row, sequence, count in rows:
            sequence.history = asked.canonical[row, count : count + past].copy()

    def rows(
        self, asked: Asked, layer: str, rows: Rows, before: Any
    ) -> tuple[jax.Array | None, dict[int, str]]:
        """(rows [B, S, H, dim], or None for a layer that is off; row of the batch -> read error).

        before: an array that the device computes meanwhile, to see whether it had to wait.
        """
        if layer not in asked.futures:
            return None, {}
        found: Any = asked.futures[layer]
        if not isinstance(found, Future):
            return found, {}
        try:
            if found.done():
                return found.result(), {}
            began = time.perf_counter()
            value = found.result()
            waited = time.perf_counter() - began
            self._waits["waits"] += 1
            self._waits["wait_seconds"] += waited
            if before.is_ready():
                self._waits["late"] += 1
                self._waits["late_seconds"] += waited
            return value, {}
        except UserError:
            return self._one_by_one(asked, layer, rows)

    def _one_by_one(self, asked: Asked, layer: str, rows: Rows) -> tuple[jax.Array, dict[int, str]]:
        """Read each sequence's rows separately, to find the sequences whose rows are damaged."""
        addresses, errors = asked.addresses[layer], {}
        parts: dict[int, jax.Array] = {}
        for row, _, count in rows:
            own = addresses[row : row + 1].copy()
            own[:, count:] = own[:, :1]  # its padding may be another sequence's row
            try:
                parts[row] = self.memory[layer].fetch(own, asked.real[row : row + 1])[0]
            except UserError as error:
                errors[row] = str(error)
        if errors:
            self._waits["read_errors"] += len(errors)
            self.error = next(iter(errors.values()))
        read = next(iter(parts.values()), None)
        shape = (*addresses.shape[1:], self._dim)
        nothing = jnp.zeros(shape) if read is None else jnp.zeros_like(read)
        return jnp.stack([parts.get(row, nothing) for row in range(len(addresses))]), errors

    def stats(self) -> dict[str, float]:
        """Sums over layers, and the engine's waiting for rows.

        read_errors: sequences that ended because their rows could not be read.
        waits, wait_seconds: how often and how long the host waited for rows. late, late_seconds:
        of these, when the device had run out of work meanwhile. Rows that are ready when the host
        asks count as no wait, and the transfer to the device is not measured: this is not all of
        the device's idle time.
        """
        total: dict[str, float] = {}
        for memory in self.memory.values():
            for name, value in memory.stats().items():
                total[name] = total.get(name, 0) + value
        return {f"rows_{name}": value for name, value in total.items()} | self._waits

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
