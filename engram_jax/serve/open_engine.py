"""Makes an engine from a trained run: its weights, and its tables where config.serve puts them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from engram_jax.addressing import drawable_ids
from engram_jax.checkpoint.load_model import LoadedModel, load_model
from engram_jax.config import DEVICE, HOST, Config, ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.config.extras import require
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree
from engram_jax.hardware.memory import device_bytes, machine_bytes
from engram_jax.model.memory_needs import check_serving
from engram_jax.model.program import check_decodes
from engram_jax.serve.compatibility import Warn, check_memory_file, for_one, with_capacity
from engram_jax.serve.engine import Engine
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.request import Delta, SamplingParams
from engram_jax.serve.row_fetch import DeviceMemory, LayerMemory

if TYPE_CHECKING:  # of the extra `serve`
    from engram_jax.memory.store.memory_file import MemoryFile


Tell = Callable[[str], None]


def _nothing(line: str) -> None:
    pass


def open_engine(
    config: Config, workdir: Path, step: str, accept: Sequence[str] = (), tell: Tell = _nothing
) -> Engine:
    """The engine of a run's checkpoint; config.serve says where its tables are stored.

    accept: keys or sections of `config` that may differ from what the run was trained with. tell:
    is given a line for each part that may take long.

    Raises UserError without a checkpoint, or for another model's memory file.
    """
    check_memory(config, config.serve.capacity or config.data.seq_len)
    return make_engine(load_for(config, workdir, step, accept, tell), config.serve, tell=tell)


def check_memory(config: Config, capacity: int) -> None:
    """Raises UserError, before anything is read, if the engine of config.serve for sequences of
    `capacity` tokens takes more memory than there is."""
    agree(lambda: check_serving(config, capacity, device_bytes(), machine_bytes()))


def load_for(
    config: Config, workdir: Path, step: str, accept: Sequence[str] = (), tell: Tell = _nothing
) -> LoadedModel:
    """The weights, and the tables where config.serve wants them, unless they come from a memory
    file or are all off.

    Raises UserError, also before anything is read if config.serve needs packages that are missing
    or the model cannot decode.
    """
    check_decodes(config)
    serve = config.serve
    if key := stored_rows(serve):
        require("serve", key)
    if serve.memory != DEVICE and jax.process_count() > 1:
        raise UserError(
            f"config.serve.memory = {serve.memory!r}: must be 'device' with several processes"
        )
    rows: str | None = DEVICE if serve.memory == DEVICE else HOST
    if serve.memory_file or all(map(serve.is_off, config.model.engram.layers)):
        rows = None
    return load_model(config, workdir, step, rows=rows, accept=accept, tell=tell)


def make_engine(
    trained: LoadedModel, serve: ServeConfig, warn: Warn = processes.warn, tell: Tell = _nothing
) -> Engine:
    """An engine over weights and tables from `load_for`. warn: called with lines for the user.

    Raises UserError for rows, weights and lengths that do not match (serve/compatibility.py).
    """
    steps = compile_for(trained, with_capacity(trained, serve, warn))
    return engine_of(trained, steps, warn, tell)


def compile_for(trained: LoadedModel, serve: ServeConfig) -> EngineSteps:
    """The compiled steps of a model's engines with the configuration `serve`; they hold no
    weights."""
    vocab = trained.program.config.tokenizer.vocab_size
    return EngineSteps(trained.program, serve, drawable_ids(trained.tokenizer, vocab))


def engine_of(
    trained: LoadedModel, steps: EngineSteps, warn: Warn, tell: Tell = _nothing
) -> Engine:
    """An engine with steps of `compile_for`. Errors as of `make_engine`."""
    program, weights = trained.program, trained.weights
    if key := stored_rows(steps.serve):
        tell(f"opening the tables: {key}")
    memory = _memories(trained, steps.serve, warn)
    return Engine(program, weights, memory, steps, trained.tokenizer, trained.eos_id)


def _memories(trained: LoadedModel, serve: ServeConfig, warn: Warn) -> Mapping[str, LayerMemory]:
    program, rows = trained.program, trained.weights.rows
    if not stored_rows(serve):
        on = [layer for layer in program.table_rows if not serve.is_off(layer)]
        return {layer: DeviceMemory(program, rows[layer]) for layer in on}
    from engram_jax.serve.open_memories import open_memories

    def check(file: MemoryFile) -> None:
        check_memory_file(file, trained, serve, warn)

    return open_memories(program, serve, rows, check)


def stored_rows(serve: ServeConfig) -> str:
    """The key by which stored rows are asked for, with its value; "" = none, tables of a checkpoint
    on the device. The extra `serve` reads them."""
    keys = {"memory": serve.memory, "memory_file": serve.memory_file}
    keys |= {"frequency_file": serve.frequency_file}
    asked = [f"config.serve.{k} = {v!r}" for k, v in keys.items() if v not in ("", DEVICE)]
    return "".join(asked[:1])


def print_continuation(
    config: Config, workdir: Path, step: str, prompt: str, accept: Sequence[str] = ()
) -> None:
    """Stream a prompt's continuation to standard output. accept: as in `open_engine`."""
    one = dataclasses.replace(config.serve, sequences=1, prefill_sequences=1, pages=0)
    check_memory(dataclasses.replace(config, serve=one), config.generate.max_tokens)
    tell = processes.stages(sys.stderr)  # standard output is the text
    trained = load_for(config, workdir, step, accept, tell)
    ids = trained.tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise UserError("prompt: must have at least one token")
    warn, most = processes.warn, config.generate.max_tokens
    serve = for_one(trained, config.serve, len(ids), most, warn)
    engine = engine_of(trained, compile_for(trained, serve), warn, tell)
    tell("compiling, then generating")
    deltas = engine.stream(ids, SamplingParams.of(config.generate))
    for piece in itertools.chain([prompt], map(_text, deltas), ["\n"]):
        if jax.process_index() == 0:  # every process decodes, one prints
            print(piece, end="", flush=True)
    engine.close()


def _text(delta: Delta) -> str:
    if delta.error:
        raise UserError(delta.error)
    return delta.text
