"""--mode=compile: compiles the training or serving step for a described TPU slice; no TPU needed.

The compiled programs are those that run: the same functions, meshes, shardings and donations, with
shapes in place of arrays. Only the values of the tokenizer's compression are made up where no
tokenizer is given, not its shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import Addressing, build_addressing, load_tokenizer
from engram_jax.addressing.fgrams import FgramAddressing, evenly
from engram_jax.aot import PREFILL, TRAIN, predict_report, step_cost
from engram_jax.aot.compiling import STAGES, DoesNotFitError, compile_with_texts
from engram_jax.aot.predict import Assumptions, examine
from engram_jax.aot.topology import Topology, parse_topology, slice_topology, slices_of
from engram_jax.config import PAPER, SCONE, Config
from engram_jax.config.errors import UserError
from engram_jax.hardware.xla_flags import options_of
from engram_jax.model.describe import training_flops
from engram_jax.model.program import PLANNED_DISTINCT, Program, build_program
from engram_jax.serve.lower_steps import LoweredSteps, lower_steps
from engram_jax.sharding.rules import BATCH, P, make_mesh
from engram_jax.training.state import TrainingProgram, TrainState, abstract_state, build_training
from engram_jax.training.step import jit_train_step

SHARE_OF_CANONICAL = 0.766  # of a tokenizer's ids, where neither is known (DeepSeek-V3's)


def compile_step(
    config: Config,
    topology_name: str,
    program_name: str = TRAIN,
    dump: Path | None = None,
    assumptions: Assumptions | None = None,
) -> dict[str, Any]:
    """`step_cost.examine` of the compiled step, with the mesh, the cost of the row exchange and,
    where it fits, its `predicted` time (`predict_report.predicted`; of several programs
    `predict_report.together`, each with its own).

    topology_name: "v5p:4x4x8". program_name: "train": one update of the whole batch; "decode" or
      "prefill": what the inference engine runs for one more token of serve.sequences sequences, or
      for serve.prefill_chunk tokens of serve.prefill_sequences prompts.
    dump: a folder to keep the compiler's texts in, as NAME_PROGRAM_SLICE.STAGE.txt
      (`compiling.STAGES`; serving's programs with their names behind PROGRAM).
    assumptions: of the prediction; default: `predict_report.assumed_of` the configuration.

    Raises UserError for an unknown slice and for a mesh that does not fit it or the model.
    """
    topology = slice_topology(topology_name)
    mesh = make_mesh(config.mesh, topology.devices)
    assumptions = assumptions or predict_report.assumed_of(config)
    about: dict[str, Any] = {
        "name": config.name,
        "program": program_name,
        "mesh": {name: mesh.shape[name] for name in mesh.axis_names},
        "accumulation": config.train.accumulation,
        "xla_options": options_of(mesh),
    }
    label = f"{config.name}_{program_name}"

    def keep(label: str) -> Path | None:
        return dump and dump / f"{label}_{topology_name.replace(':', '_')}"

    if program_name == TRAIN:
        program = build_training(config, _addressing(config), mesh)
        about["global_batch_tokens"] = config.data.batch_size * config.data.seq_len
        about["state_bytes"] = _state_bytes(abstract_state(program))
        if program.layouts:
            about["exchange"] = exchange_of(program)
        tokens = about["global_batch_tokens"]
        flops = tokens * training_flops(config)
        work = predict_report.Work(assumptions, tokens, flops)
        return about | _examined(program, *_train(program), topology, keep(label), work)
    serving = build_program(config, _addressing(config), mesh)
    steps = _lowered(serving, program_name)
    prompts = config.serve.prefill_sequences * config.serve.prefill_chunk
    about["global_batch_tokens"] = prompts if program_name == PREFILL else config.serve.sequences
    about["state_bytes"] = _kept_bytes(steps)
    parts = {
        name: _examined(
            serving,
            lowered,
            steps.cache if "rows" not in name else (),
            topology,
            keep(f"{label}_{name.replace(' ', '_')}"),
            predict_report.Work(assumptions),
        )
        for name, lowered in steps.programs.items()
    }
    whole = step_cost.together(parts, sum(about["state_bytes"].values()))
    if whole["fits"]:
        times = [part["predicted"] for part in parts.values()]
        whole["predicted"] = predict_report.together(times, about["global_batch_tokens"])
    return about | whole


def _examined(
    program: Program,
    lowered: jax.stages.Lowered,
    state: Any,
    topology: Topology,
    keep: Path | None,
    work: predict_report.Work,
) -> dict[str, Any]:
    """The report of one program, compiled. state: its donated arguments; keep: as in
    `compile_with_texts`."""
    dim = program.config.model.engram.dim
    tables = [(layout.rows_per_device, dim) for layout in program.layouts.values()]
    try:
        compiled, texts, seconds = compile_with_texts(lowered, options_of(program.mesh), keep=keep)
    except DoesNotFitError as error:
        return step_cost.does_not_fit(error, topology, state, tables)
    optimized, scheduled = (texts[stage] for stage in STAGES)
    report = step_cost.examine(compiled, optimized, topology, state, tables, seconds)
    step = examine(scheduled, topology.name, work.assumptions)
    return report | {"predicted": predict_report.predicted(step, work.tokens, work.flops)}


def smallest_slice(
    config: Config, topology_name: str, program_name: str, log: Callable[[str], None]
) -> str | None:
    """The smallest slice of the same generation that a step fits which does not fit
    `topology_name`; None if there is none. It compiles for one slice after another, which takes
    minutes.

    The number of microbatches is adapted so that a device keeps its number of sequences.
    """
    generation, size = parse_topology(topology_name)
    here, addressing = math.prod(size), _addressing(config)
    for name in slices_of(generation.name):
        chips = math.prod(parse_topology(name)[1])
        parts, factor = config.train.accumulation, chips / here
        larger = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, accumulation=max(1, int(parts / factor))),
        )
        if factor <= 1:
            continue
        try:
            topology = slice_topology(name)
            mesh = make_mesh(config.mesh, topology.devices)
            if program_name == TRAIN:
                state = _state_bytes(abstract_state(build_training(larger, addressing, mesh)))
            else:
                serving = build_program(larger, addressing, mesh)
                state = _kept_bytes(_lowered(serving, program_name))
            if sum(state.values()) > topology.hbm_capacity_bytes:
                continue
            log(f"does not fit {topology_name}; compiling for {name}")
            if compile_step(larger, name, program_name)["fits"]:
                return name
        except UserError as error:
            log(f"{name}: {error}")
    return None


def _state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes on one device, without padding, of a training state."""
    memory = state.memory.values()
    return {
        "parameters": step_cost.shard_bytes((state.params, state.router_bias)),
        "tables": step_cost.shard_bytes([table.rows for table in memory]),
        "optimizer": step_cost.shard_bytes(state.opt_state),
        "table_moments": step_cost.shard_bytes([(table.mu, table.nu) for table in memory]),
    }


def _lowered(program: Program, program_name: str) -> LoweredSteps:
    return lower_steps(program, program.config.serve, prefill=program_name == PREFILL)


def _kept_bytes(steps: LoweredSteps) -> dict[str, int]:
    """Bytes on one device, without padding, of the engine's resident arrays."""
    weights = steps.weights
    return {
        "parameters": step_cost.shard_bytes((weights.params, weights.router_bias)),
        "tables": step_cost.shard_bytes(weights.rows),
        "caches": step_cost.shard_bytes((steps.cache, steps.kept)),
    }


def exchange_of(program: Program) -> dict[str, Any]:
    """Planned rows and bytes that one device receives for one table in a step, one way."""
    devices, width = program.axes.devices, program.config.model.engram.dim
    item = jnp.dtype(program.config.model.dtype).itemsize
    distinct = program.config.mesh.distinct or PLANNED_DISTINCT
    capacity = program.row_capacity()
    return {
        "lookups": program.lookups,
        "planned_distinct": distinct,
        "capacity": capacity,
        "rows_received": capacity * (devices - 1),
        "bytes_received": capacity * (devices - 1) * width * item,
        "bytes_needed": round(program.lookups * distinct * (devices - 1) / devices) * width * item,
    }


def _addressing(config: Config) -> Addressing | None:
    """The configuration's addressing; without a tokenizer, with a made-up compression; without a
    text, with made-up f-grams."""
    tokens, engram = config.tokenizer, config.model.engram
    if not engram.layers:
        return None
    if engram.form == SCONE:
        found = build_addressing(config, load_tokenizer(tokens.path) if tokens.path else None)
        layers = dict(found.layers)
        for layer_id, layer in found.layers.items():
            if isinstance(layer, FgramAddressing):
                layers[layer_id] = evenly(layer)
        return dataclasses.replace(found, layers=layers)
    if tokens.path:
        return build_addressing(config, load_tokenizer(tokens.path))
    if not engram.compression:
        return build_addressing(config, None)
    if not tokens.canonical_vocab_size and engram.hash_dialect == PAPER:
        size = round(SHARE_OF_CANONICAL * tokens.vocab_size)
        known = dataclasses.replace(tokens, canonical_vocab_size=size)
        config = dataclasses.replace(config, tokenizer=known)
    addressing = build_addressing(config, None)
    ids = np.arange(tokens.vocab_size, dtype=np.int32) % addressing.canonical_vocab_size
    return dataclasses.replace(addressing, compression=ids)


def _train(program: TrainingProgram) -> tuple[jax.stages.Lowered, Any]:
    state = abstract_state(program)
    return jit_train_step(program).lower(state, _batch(program)), state


def _batch(program: Program) -> dict[str, Any]:
    """The shapes, dtypes and shardings of a batch from the data pipeline."""
    data, engram = program.config.data, program.config.model.engram
    shape = (data.batch_size, data.seq_len)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(program.mesh, P(BATCH)))

    batch: dict[str, Any] = {k: array(shape, jnp.int32) for k in ("tokens", "targets")}
    batch |= {k: array(shape, jnp.int32) for k in ("segments", "positions")}
    batch["loss_mask"] = array(shape, jnp.float32)
    if program.layouts and engram.addresses == "host":
        batch["addresses"] = {k: array((*shape, engram.heads), jnp.int32) for k in program.layouts}
    return batch


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / step_cost.GIB:.2f} GiB"


def _received(part: dict[str, Any]) -> str:
    return f"{sum(c['bytes'] for c in part['collectives']) / 2**20:.1f} MiB"


def as_table(found: dict[str, Any]) -> str:
    """A report as text for a terminal."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1)
    lines = [
        f"{found['name']}, {found['program']} step, {found['global_batch_tokens']:,} tokens,"
        f" mesh {mesh or 'of one device'}, accumulation {found['accumulation']}",
        "state of a device: "
        + ", ".join(
            f"{name.replace('_', ' ')} {_gib(size)}" for name, size in found["state_bytes"].items()
        ),
    ]
    lines += [
        f"  {name:<10} temporaries {_gib(part['temp_bytes'])}, {_received(part)} received"
        + (f", {predict_report.headline(part['predicted'])}" if "predicted" in part else "")
        for name, part in found.get("programs", {}).items()
    ]
    if "exchange" in found:
        e = found["exchange"]
        lines.append(
            f"rows of one table, one way: {e['rows_received']:,} per device,"
            f" {e['bytes_received'] / 2**20:.1f} MiB,"
            f" {e['bytes_received'] / max(1, e['bytes_needed']):.2f} x what"
            f" {e['planned_distinct']:.0%} distinct lookups need"
        )
    lines.append(step_cost.as_table(found))
    if "predicted" in found:
        lines.append(predict_report.as_table(found["predicted"]))
    if "smallest_slice" in found:
        lines.append(f"smallest slice that holds it: {found['smallest_slice'] or 'none'}")
    return "\n".join(lines)
