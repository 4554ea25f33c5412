"""Makes an engine from a trained run: its weights, and its tables where config.serve puts them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.checkpoint.load_model import LoadedModel, load_model
from engram_jax.config import DEVICE, DISK, HOST, Config, ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.distributed import processes
from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.memory_file import MemoryFile, open_memory
from engram_jax.memory.store.read_counts import Frequency, load_frequency
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.row_source import RowSource
from engram_jax.model.program import Program
from engram_jax.serve.compatibility import Warn, check_memory, for_one, with_capacity
from engram_jax.serve.engine import Engine
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.request import Delta, SamplingParams
from engram_jax.serve.row_fetch import DeviceMemory, LayerMemory, StagedMemory, on_device


def open_engine(config: Config, workdir: Path, step: str, accept: Sequence[str] = ()) -> Engine:
    """The engine of a run's checkpoint; config.serve says where its tables are stored.

    accept: keys or sections of `config` that may differ from what the run was trained with.

    Raises UserError without a checkpoint, or for another model's memory file.
    """
    return make_engine(load_for(config, workdir, step, accept), config.serve)


def load_for(config: Config, workdir: Path, step: str, accept: Sequence[str] = ()) -> LoadedModel:
    """The weights, and the tables where config.serve wants them, unless they come from a memory
    file or are all off."""
    serve = config.serve
    if serve.memory != DEVICE and jax.process_count() > 1:
        raise UserError(
            f"config.serve.memory = {serve.memory!r}: must be 'device' with several processes"
        )
    rows: str | None = DEVICE if serve.memory == DEVICE else HOST
    if serve.memory_file or all(map(serve.is_off, config.model.engram.layers)):
        rows = None
    return load_model(config, workdir, step, rows=rows, accept=accept)


def make_engine(trained: LoadedModel, serve: ServeConfig, warn: Warn = processes.warn) -> Engine:
    """An engine over weights and tables from `load_for`. warn: called with lines for the user.

    Raises UserError for rows, weights and lengths that do not match (serve/compatibility.py).
    """
    return _engine(trained, with_capacity(trained, serve, warn), warn)


def _engine(trained: LoadedModel, serve: ServeConfig, warn: Warn) -> Engine:
    program, weights = trained.program, trained.weights
    memory = open_memories(
        program, serve, weights.rows, lambda file: check_memory(file, trained, serve, warn)
    )
    steps = EngineSteps(program, serve)
    return Engine(program, weights, memory, steps, trained.tokenizer, trained.eos_id)


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
    file = open_memory(serve.memory_file, fingerprint) if serve.memory_file else None
    if file is not None:
        check(file)
    counts: dict[str, Frequency] = {}
    if serve.frequency_file:
        counts = load_frequency(serve.frequency_file, fingerprint).layers
    made: dict[str, LayerMemory] = {}
    for layer in program.table_rows:
        if serve.is_off(layer):
            continue
        if file is not None:
            _check_file(program, serve, file, layer)
        if counts and layer not in counts:
            have = ", ".join(counts)
            raise UserError(f"{serve.frequency_file}: has no Engram layer {layer}; it has {have}")
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
        have = ", ".join(file.layers)
        raise UserError(f"{serve.memory_file}: has no Engram layer {layer}; it has {have}")
    rows, stored = file.layers[layer]
    mine = program.table_rows[layer], program.config.model.engram.dim
    if (rows, stored.dim) != mine:
        raise UserError(
            f"{serve.memory_file}: layer {layer} has {rows} rows of {stored.dim}, this model"
            f" {mine[0]} of {mine[1]}"
        )


def print_continuation(
    config: Config, workdir: Path, step: str, prompt: str, accept: Sequence[str] = ()
) -> None:
    """Stream a prompt's continuation to standard output. accept: as in `open_engine`."""
    trained = load_for(config, workdir, step, accept)
    ids = trained.tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise UserError("prompt: must have at least one token")
    warn, most = processes.warn, config.generate.max_tokens
    engine = _engine(trained, for_one(trained, config.serve, len(ids), most, warn), warn)
    deltas = engine.stream(ids, SamplingParams.of(config.generate))
    for piece in itertools.chain([prompt], map(_text, deltas), ["\n"]):
        if jax.process_index() == 0:  # every process decodes, one prints
            print(piece, end="", flush=True)
    engine.close()


def _text(delta: Delta) -> str:
    if delta.error:
        raise UserError(delta.error)
    return delta.text
