"""What a row of a table answers to: the n-grams of a text that read it, and the rows like it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import Addressing
from engram_jax.addressing.compression import canonical_keys
from engram_jax.addressing.detokenizer import text_of
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.analysis import usage
from engram_jax.analysis.usage import NgramCounts, rows_of
from engram_jax.memory.table import Tables
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P

ROWS = 1 << 14  # rows that are read from a table at a time


@dataclass(frozen=True)
class Readers:
    """n-grams that read a row: windows int32 [n, order], canonical ids, oldest first; counts int64
    [n], how often each is in the text, descending (equal ones in the order of their ids). total:
    how many different ones there are, hits: how often the row is read, all of them together."""

    windows: np.ndarray
    counts: np.ndarray
    total: int
    hits: int


def readers(
    layer: LayerAddressing, counts: NgramCounts, rows: Sequence[int], most: int = 8
) -> dict[int, Readers]:
    """Which n-grams of an order read each of some rows of a layer's table; of each at most `most`,
    the most frequent ones."""
    wanted = np.unique(np.asarray(rows, np.int64))
    found: dict[int, list[np.ndarray]] = {int(row): [] for row in wanted}
    for start in range(0, len(counts.windows), usage.BLOCK):
        addresses = rows_of(layer, counts.order, counts.windows[start : start + usage.BLOCK])
        ngram, head = np.nonzero(np.isin(addresses, wanted))
        for row in np.unique(addresses[ngram, head]):
            found[int(row)].append(start + ngram[addresses[ngram, head] == row])
    result = {}
    for row, parts in found.items():
        at = np.concatenate([np.zeros(0, np.int64), *parts])
        times = counts.counts[at]
        best = np.argsort(-times, kind="stable")[:most]
        result[row] = Readers(counts.windows[at[best]], times[best], len(at), int(times.sum()))
    return result


def head_of(layer: LayerAddressing, row: int) -> int:
    """Which head of a layer a row of its table belongs to."""
    return int(np.searchsorted(layer.offsets, row, side="right")) - 1


def order_of(layer: LayerAddressing, row: int) -> int:
    """The order of the n-grams that read a row."""
    return layer.orders[head_of(layer, row) // layer.heads_per_order]


def read_rows(program: Program, memory: Tables, layer: int, rows: np.ndarray) -> np.ndarray:
    """Rows of a layer's table by address, int [n] -> float32 [n, dim]."""
    dim = program.config.model.engram.dim
    parts = [np.zeros((0, dim), np.float32), *_blocks(program, memory, layer, rows)]
    return np.concatenate(parts)


def row_norms(program: Program, memory: Tables, layer: int) -> np.ndarray:
    """The Euclidean norm of every row of a layer's table that has an address: float32 [R]."""
    rows = np.arange(_layer(program, layer).rows)
    blocks = _blocks(program, memory, layer, rows)
    return np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])


def nearest_rows(
    program: Program, memory: Tables, layer: int, row: int, most: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """(addresses int64 [n], cosines float32 [n]) of the rows of the same head that are most like a
    row, descending, itself left out: other heads' rows are read by other columns of the projection.
    Rows of zeros are like none."""
    addressing = _layer(program, layer)
    head = head_of(addressing, row)
    first = addressing.offsets[head]
    rows = np.arange(first, first + addressing.head_sizes[head])
    (own,) = read_rows(program, memory, layer, np.asarray([row]))
    found = []
    for block in _blocks(program, memory, layer, rows):
        lengths = np.linalg.norm(block, axis=1) * np.linalg.norm(own)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(lengths > 0, block @ own / lengths, -np.inf))
    cosines = np.concatenate(found)
    cosines[row - first] = -np.inf
    best = np.argsort(-cosines, kind="stable")[:most]
    best = best[np.isfinite(cosines[best])]
    return rows[best], cosines[best]


class CanonicalText:
    """Canonical ids as text: the key that its tokens share, or the token's text where raw ids are
    hashed; a lone space is ␣. fill_id: what is read before a document's start, shown as ⊢."""

    def __init__(self, addressing: Addressing, tokenizer: Any, fill_id: int):
        self._tokenizer, self._fill = tokenizer, fill_id
        self._keys: dict[int, str] = {}
        if addressing.compression is not None:
            pairs = zip(addressing.compression.tolist(), canonical_keys(tokenizer), strict=True)
            self._keys = dict(pairs)

    def __call__(self, window: Sequence[int] | np.ndarray) -> str:
        """An n-gram, oldest id first, with a dot between ids: "new·york"."""
        ids = [int(i) for i in window]
        before = next((k for k, i in enumerate(ids) if i != self._fill), len(ids))
        texts = [self._keys.get(i) or text_of(self._tokenizer, i) for i in ids[before:]]
        return "·".join(["⊢"] * before + ["␣" if text == " " else text for text in texts])


def _layer(program: Program, layer: int) -> LayerAddressing:
    assert program.addressing is not None
    found = program.addressing.layers[layer]
    assert isinstance(found, LayerAddressing)
    return found


def _blocks(program: Program, memory: Tables, layer: int, rows: np.ndarray) -> Iterator[np.ndarray]:
    """float32 [at most ROWS, dim] of rows by address, a block of them after the other."""
    table, layout = memory[str(layer)].rows, program.layouts[str(layer)]
    gather = _gather(program.mesh)
    for start in range(0, len(rows), ROWS):
        chosen = rows[start : start + ROWS]
        stored = chosen % layout.devices * layout.rows_per_device + chosen // layout.devices
        padded = np.zeros(min(ROWS, 1 << (len(rows) - 1).bit_length()), np.int32)
        padded[: len(chosen)] = stored
        yield np.asarray(gather(table, padded))[: len(chosen)]


@lru_cache
def _gather(mesh: Any) -> Any:
    def gather(table: jax.Array, rows: jax.Array) -> jax.Array:
        return table[rows].astype(jnp.float32)

    return jax.jit(gather, out_shardings=NamedSharding(mesh, P()))
