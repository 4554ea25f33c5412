"""Opens every Engram layer's table on the tier that config.serve selects.

Tables come from a checkpoint or a memory file, and are loaded onto the device or into DRAM, or read
from the file through a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engram_jax.config import DEVICE, DISK, ServeConfig
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import local_path
from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.memory_file import MemoryFile, open_memory
from engram_jax.memory.store.read_counts import Frequency, load_frequency
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.row_source import RowSource
from engram_jax.model.program import Program
from engram_jax.serve.row_fetch import DeviceMemory, LayerMemory, on_device
from engram_jax.serve.staged_rows import StagedMemory


def open_memories(
    program: Program,
    serve: ServeConfig,
    rows: Any = None,
    check: Callable[[MemoryFile], None] = lambda file: None,
) -> dict[str, LayerMemory]:
    """Every Engram layer's table, on the tier that `serve` selects.

    rows: tables [R, dim] by layer id (on the device for memory = "device"), or None or empty = they
    come from serve.memory_file. check: called with that file, may raise UserError.

    Raises UserError for a memory or frequency file that is unusable or does not fit the model.
    """
    if program.addressing is None:
        return {}
    fingerprint = program.addressing.fingerprint
    path = local_path("config.serve.memory_file", serve.memory_file)
    file = open_memory(path, fingerprint) if serve.memory_file else None
    if file is not None:
        check(file)
    counts: dict[str, Frequency] = {}
    if serve.frequency_file:
        path = local_path("config.serve.frequency_file", serve.frequency_file)
        counts = load_frequency(path, fingerprint).layers
    made: dict[str, LayerMemory] = {}
    for layer in program.table_rows:
        if serve.is_off(layer):
            continue
        if file is not None:
            _check_file(program, serve, file, layer)
        if counts and layer not in counts:
            have = shown(", ".join(counts))
            raise UserError(f"{serve.frequency_file}: has no Engram layer {layer}; it has {have}")
        if counts and counts[layer].rows != program.table_rows[layer]:
            raise UserError(
                f"{serve.frequency_file}: counted layer {layer} as a table of"
                f" {counts[layer].rows} rows, this model's has {program.table_rows[layer]}"
            )
        if serve.memory == DEVICE:
            made[layer] = _on_device(program, file, layer, rows)
            continue
        source, hot = _source(serve, file, layer, rows), None
        found = counts.get(layer)
        if serve.device_cache:
            assert found is not None  # config/validate.py
            hot = found.ids[: int(serve.device_cache * source.rows)]
            found = found.behind(len(hot))
        if serve.memory == DISK and serve.host_cache:
            source = CachedTable(source, max(1, int(serve.host_cache * source.rows)))
            if found is not None:
                source.warm(found)
        made[layer] = StagedMemory(program, source, hot)
    return made


def _on_device(program: Program, file: MemoryFile | None, layer: str, rows: Any) -> DeviceMemory:
    if file is None:
        return DeviceMemory(program, rows[layer])
    stored = file.host(layer)
    return DeviceMemory(program, on_device(program, stored.parts), stored.format)


def _source(serve: ServeConfig, file: MemoryFile | None, layer: str, rows: Any) -> RowSource:
    if serve.memory == DISK:
        assert file is not None  # config/validate.py
        return file.disk(layer)
    if file is not None:
        return file.host(layer)
    values = np.asarray(rows[layer])
    stored = RowFormat(values.dtype.name, values.shape[1])
    return HostTable(stored, stored.encode(values))


def _check_file(program: Program, serve: ServeConfig, file: MemoryFile, layer: str) -> None:
    if layer not in file.layers:
        have = shown(", ".join(file.layers))
        raise UserError(f"{serve.memory_file}: has no Engram layer {layer}; it has {have}")
    rows, stored = file.layers[layer]
    mine = program.table_rows[layer], program.config.model.engram.dim
    if (rows, stored.dim) != mine:
        raise UserError(
            f"{serve.memory_file}: layer {layer} has {rows} rows of {stored.dim}, this model"
            f" {mine[0]} of {mine[1]}"
        )
