"""Addresses of frequent n-grams (f-grams): the row of the longest one that ends at a token.

SCONE, arXiv 2502.01637. The K most frequent n-grams of the training text (data/fgram_counts.py) are
sorted, shorter ones first, then by their token ids, and the n-gram at place i has row i. A token at
which none of them ends has row K, the spare row, which is zero and stays so. N-grams are of raw
token ids: their embedding replaces the token's own, which a compressed vocabulary would merge with
others. Like the hash, they do not reach across the start of a document.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NO_TOKEN = -1  # read before a document's start: in no f-gram


@dataclass(frozen=True, eq=False)
class FgramAddressing:
    """The f-grams of one layer; the same interface as LayerAddressing, without a hash.

    layer_id: 0-based. orders: n-gram orders, ascending.
    count: K.
    ngrams: for every order n int32 [K_n, n], oldest token first, rows ascending; the K_n add up to
      K. None = not counted yet (describe; opening a checkpoint, which has its own).

    Raises ValueError where the fields do not fit each other.
    """

    layer_id: int
    orders: tuple[int, ...]
    count: int
    ngrams: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        if self.ngrams is None:
            return
        shapes = [table.shape[1:] for table in self.ngrams]
        if shapes != [(n,) for n in self.orders] or sum(map(len, self.ngrams)) != self.count:
            raise ValueError(f"f-grams of shapes {shapes}: must be {self.count} of {self.orders}")
        if not all(_ascending(table) for table in self.ngrams):
            raise ValueError("f-grams must be ascending, each one once")

    @property
    def max_ngram(self) -> int:
        """N: the longest order; N - 1 ids of history are read."""
        return max(self.orders)

    @property
    def rows(self) -> int:
        """Rows of the table: K, and the spare one."""
        return self.count + 1

    @property
    def padded_rows(self) -> int:
        return self.rows

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return (self.rows,)

    @property
    def heads(self) -> int:
        """Rows read per token."""
        return 1

    @property
    def multipliers(self) -> tuple[int, ...]:
        return ()

    @property
    def fill_id(self) -> int:
        return NO_TOKEN

    @property
    def restart_id(self) -> None:
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the f-grams; "" = not counted."""
        if self.ngrams is None:
            return ""
        data = b"".join(np.ascontiguousarray(t, "<i4").tobytes() for t in self.ngrams)
        return hashlib.sha256(data).hexdigest()

    def numbers(self) -> dict[str, Any]:
        """What decides an address, the f-grams by their digest, as JSON values."""
        return {
            "layer_id": self.layer_id,
            "orders": list(self.orders),
            "count": self.count,
            "fgrams": self.digest,
        }


def _ascending(table: np.ndarray) -> bool:
    """Whether every row of [K, n] is lexicographically above the one before it."""
    later, earlier = table[1:], table[:-1]
    different = later != earlier
    first = np.argmax(different, axis=1)[:, None]
    above = np.take_along_axis(later > earlier, first, axis=1)
    return bool(np.all(above & different.any(axis=1, keepdims=True)))


def find(ids: list[np.ndarray], layer: FgramAddressing) -> np.ndarray:
    """Rows int32 [..., T, 1]. ids: of `hash_numpy.lookback`, [x_t, x_{t-1}, ..], each [..., T]."""
    found = np.full(np.shape(ids[0]), layer.count, np.int32)
    for table, offset, gram in _by_order(ids, layer):
        position = np.zeros(found.shape, np.int32)
        for i in range(_bits(table)):
            position = _advance(np, table, gram, position, i)
        at, same = _match(np, table, gram, position)
        found = np.where(same, at + offset, found)
    return found[..., None].astype(np.int32)


def find_on_device(ids: list[jax.Array], layer: FgramAddressing) -> jax.Array:
    """`find`, compiled; the f-grams are constants of the program. ids: of `hash_jax.lookback`."""
    found = jnp.full(ids[0].shape, layer.count, jnp.int32)
    for table, offset, gram in _by_order(ids, layer):
        position = jax.lax.fori_loop(
            0,
            _bits(table),
            lambda i, p, table=table, gram=gram: _advance(jnp, table, gram, p, i),
            jnp.zeros(found.shape, jnp.int32),
        )
        at, same = _match(jnp, table, gram, position)
        found = jnp.where(same, at + offset, found)
    return found[..., None]


def _by_order(ids: list[Any], layer: FgramAddressing) -> list[tuple[np.ndarray, int, list[Any]]]:
    """(f-grams [K_n, n], their first row, the n-gram at every token) of the orders that have some,
    ascending: a longer f-gram replaces a shorter one."""
    if layer.ngrams is None:
        raise ValueError("the f-grams have not been counted")
    out, offset = [], 0
    for order, table in zip(layer.orders, layer.ngrams, strict=True):
        if len(table):
            out.append((table, offset, ids[:order][::-1]))
        offset += len(table)
    return out


def _bits(table: np.ndarray) -> int:
    return len(table).bit_length()


def _advance(xp: ModuleType, table: np.ndarray, gram: list[Any], position: Any, i: Any) -> Any:
    """Step i of a binary search: `position` counts f-grams that are known to be below the n-gram,
    and grows by the i-th power of two from above if that many more are."""
    ahead = position + (1 << (_bits(table) - 1) >> i)
    at = xp.clip(ahead, 1, len(table)) - 1
    below = equal = None
    for column, token in zip(table.T, gram, strict=True):
        entry = xp.asarray(column)[at]
        less = entry < token
        below = less if below is None else below | (equal & less)
        equal = entry == token if equal is None else equal & (entry == token)
    return xp.where((ahead <= len(table)) & below, ahead, position)


def _match(xp: ModuleType, table: np.ndarray, gram: list[Any], position: Any) -> tuple[Any, Any]:
    """(place in the table, whether the n-gram stands there), `position` f-grams being below it."""
    at = xp.minimum(position, len(table) - 1)
    same = xp.ones(at.shape, bool)
    for column, token in zip(table.T, gram, strict=True):
        same = same & (xp.asarray(column)[at] == token)
    return at, same


def evenly(layer: FgramAddressing) -> FgramAddressing:
    """`layer` with made-up f-grams, as many of each order: to compile without a text."""
    parts, rest = divmod(layer.count, len(layer.orders))
    tables = []
    for i, order in enumerate(layer.orders):
        table = np.zeros((parts + (i < rest), order), np.int32)
        table[:, -1] = np.arange(len(table))
        tables.append(table)
    return FgramAddressing(layer.layer_id, layer.orders, layer.count, tuple(tables))
