"""Counts how often each row is read over real text, and stores the counts in a frequency file.

A cache starts warm from them (`CachedTable.warm`), and the rows kept on the device are chosen by
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_arrays, reason_of
from engram_jax.hardware.numba_internals import host_jit
from engram_jax.hardware.storage import replacing

_FORMAT = 1


@dataclass(frozen=True)
class Frequency:
    """One layer's rows by descending count; equal counts by ascending id.

    ids: int32 [m], rows that were read, or the most frequent of them. counts: int64 [m], how often.
    rows: R of the table. lookups: the total, including rows left out.
    """

    ids: np.ndarray
    counts: np.ndarray
    rows: int
    lookups: int

    def behind(self, count: int) -> Frequency:
        """Without the `count` most frequent rows, which a faster tier has."""
        return replace(self, ids=self.ids[count:], counts=self.counts[count:])


class AccessCounter:
    """Counts one layer's accesses, 4 bytes per row of the table whatever the text's length."""

    def __init__(self, rows: int) -> None:
        """rows: of the table, at most 2**31."""
        self._counts = np.zeros(rows, np.uint32)
        self.lookups = 0

    def add(self, ids: np.ndarray) -> None:
        """Count ids int32 or int64 [...], each in [0, rows); otherwise raises IndexError and counts
        nothing. A count saturates at 2**32 - 1."""
        flat = np.ascontiguousarray(ids).reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= self._counts.size):
            wrong = flat.min() if flat.min() < 0 else flat.max()
            raise IndexError(f"row {wrong}: must be in 0 to {self._counts.size - 1}")
        _count(self._counts, flat)
        self.lookups += flat.size

    def frequency(self, keep: int | None = None) -> Frequency:
        """The rows read so far, by descending count; at most the first `keep`."""
        ids = np.flatnonzero(self._counts).astype(np.int32)
        counts = self._counts[ids].astype(np.int64)
        order = np.argsort(-counts, kind="stable")[:keep]
        return Frequency(ids[order], counts[order], self._counts.size, self.lookups)


@host_jit
def _count(counts, ids):  # type: ignore[no-untyped-def]
    full = np.uint32(0xFFFFFFFF)
    for i in range(ids.size):
        if counts[ids[i]] != full:
            counts[ids[i]] += np.uint32(1)


def count_accesses(
    batches: Iterable[Mapping[str, np.ndarray]], rows: Mapping[str, int], keep: int | None = None
) -> dict[str, Frequency]:
    """Frequencies of all layers over a stream of `BatchAddresser`'s results.

    batches: per layer id int32 [..., H]. rows: R of each layer. keep: rows per layer at most.
    """
    counters = {layer: AccessCounter(count) for layer, count in rows.items()}
    for batch in batches:
        for layer, counter in counters.items():
            counter.add(batch[layer])
    return {layer: counter.frequency(keep) for layer, counter in counters.items()}


@dataclass(frozen=True)
class FrequencyFile:
    """The contents of a frequency file: layers, the addressing's fingerprint, tokens counted."""

    layers: dict[str, Frequency]
    fingerprint: str
    tokens: int


def save_frequency(
    path: str | Path, layers: Mapping[str, Frequency], fingerprint: str, tokens: int
) -> None:
    """Write a frequency file (npz), atomically.

    fingerprint: `Addressing.fingerprint`. tokens: of the text that was counted.
    Raises UserError when it cannot be written.
    """
    path = Path(path)
    arrays: dict[str, Any] = {
        "format": np.int64(_FORMAT),
        "fingerprint": np.str_(fingerprint),
        "tokens": np.int64(tokens),
        "layers": np.array(list(layers), np.str_),
    }
    for layer, f in layers.items():
        arrays |= {f"{layer}.ids": f.ids.astype("<i4"), f"{layer}.counts": f.counts.astype("<i8")}
        arrays[f"{layer}.table"] = np.array([f.rows, f.lookups], "<i8")
    try:
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be written ({reason_of(error)})") from error


def load_frequency(path: str | Path, fingerprint: str | None = None) -> FrequencyFile:
    """Read what `save_frequency` wrote. fingerprint: of the addressing it is for, None = any.

    Raises UserError, one line, for a file that is missing, damaged, or of another format or
    addressing.
    """
    with open_arrays(path, "frequency file") as archive:
        if int(archive["format"]) != _FORMAT:
            raise ValueError(f"format {archive['format']}, this program reads {_FORMAT}")
        layers = {str(name): _layer(archive, str(name)) for name in archive["layers"].tolist()}
        if not layers:
            raise ValueError("has no layers")
        found = FrequencyFile(layers, str(archive["fingerprint"]), int(archive["tokens"]))
    if fingerprint is not None and found.fingerprint != fingerprint:
        raise UserError(
            f"frequency file {shown(path)}: counted with addressing {shown(found.fingerprint)},"
            f" this model has {fingerprint}"
        )
    return found


def _layer(archive: Mapping[str, np.ndarray], name: str) -> Frequency:
    ids, counts = archive[f"{name}.ids"], archive[f"{name}.counts"]
    rows, lookups = (int(number) for number in archive[f"{name}.table"].tolist())
    name = shown(name)
    if ids.dtype != np.int32 or counts.dtype != np.int64 or ids.shape != counts.shape:
        raise ValueError(f"layer {name}: ids must be int32 [m], counts int64 [m]")
    if ids.ndim != 1 or (ids.size and (ids.min() < 0 or ids.max() >= rows)):
        raise ValueError(f"layer {name}: ids must be [m], each in 0 to {rows - 1}")
    if (counts < 1).any() or counts.sum() > lookups:
        raise ValueError(f"layer {name}: counts must be 1 or more, {lookups} together at most")
    if (np.diff(counts) > 0).any() or np.unique(ids).size != ids.size:
        raise ValueError(f"layer {name}: must be distinct rows by falling count")
    return Frequency(ids, counts, rows, lookups)
