"""The memory that a configuration takes at least, compared with what there is before any of it is
allocated, downloaded or read: asking for more may hang the machine.

A lower bound: what a program keeps beside (XLA's intermediate arrays, buffers of files) is not in
it. A configuration that passes can still run out; one that is refused cannot run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax.numpy as jnp

from engram_jax.config import (
    ATTENTION,
    DEVICE,
    DISK,
    EXPERTS,
    FROZEN,
    OUTPUTS,
    QUERIES,
    Config,
    ModelConfig,
    ServeConfig,
    TokenizerConfig,
)
from engram_jax.config.errors import UserError
from engram_jax.model.describe import parts, table_params

WORKER = 110e6  # bytes of a process that makes batches: measured, Python 3.12 with its imports
_WAITING = 1000.0  # bytes of a waiting request, and of a token's id in it
_ID = 36.0
_MOMENTS = 2  # of AdamW and of row-wise Adam; Muon has one


def check_training(config: Config, device: float, machine: float) -> None:
    """Raises UserError, naming the key whose part is largest.

    device: bytes of all devices that share the model. machine: of the host.
    """
    model, data = config.model, config.data
    item = jnp.dtype(model.param_dtype).itemsize
    whole = not config.train.trainable  # else: at least the parameters themselves
    moments = _MOMENTS if whole and config.optimizer.memory_optimizer != FROZEN else 0
    vocabulary, others = _parameters(config)
    row_bytes = jnp.dtype(model.engram.table_dtype).itemsize + 4 * moments
    sequences = data.batch_size / config.train.accumulation
    # What every block reads is kept for the backward pass, whatever model.remat is.
    each = model.layers * model.hyper.streams * model.d_model + _kept(model)
    kept = sequences * data.seq_len * each
    needs = {
        _named("tokenizer.vocab_size", config.tokenizer.vocab_size): vocabulary
        * item
        * (3 if whole else 1),
        "model (--mode=describe tells the parts)": others * item * (2 if whole else 1),
        _named("model.engram.rows_per_head", model.engram.rows_per_head): row_bytes
        * table_params(config),
        _named("data.seq_len", data.seq_len): kept * jnp.dtype(model.dtype).itemsize,
    }
    _compare(needs, device, "the devices together have")
    workers = {_named("data.workers", data.workers): data.workers * WORKER}
    _compare(workers, machine, "this machine has")


def _kept(model: ModelConfig) -> float:
    """Numbers of a token in what model.kept names, in all layers."""
    attention, ffn = model.attention, model.ffn
    routed = model.layers - ffn.dense_layers if ffn.routed_experts else 0
    numbers = {
        OUTPUTS: 2.0 * model.layers * model.d_model,
        ATTENTION: model.layers * attention.heads * attention.v_dim,
        QUERIES: model.layers * attention.heads * (attention.nope_dim + attention.rope_dim),
        EXPERTS: 2.0 * routed * ffn.top_k * ffn.expert_dim,
    }
    return sum(numbers[name] for name in model.kept)


def check_serving(config: Config, capacity: int, device: float, machine: float) -> None:
    """As `check_training`, for the engine of config.serve. capacity: tokens of a sequence."""
    serve, model = config.serve, config.model
    vocabulary, others = _parameters(config)
    item = jnp.dtype(model.dtype).itemsize
    needs = {
        _named("tokenizer.vocab_size", config.tokenizer.vocab_size): vocabulary * 4.0,
        "model (--mode=describe tells the parts)": others * 4.0,
        **_of_engine(config, serve, capacity, item),
    }
    if serve.memory == DEVICE:
        rows = jnp.dtype(model.engram.table_dtype).itemsize
        needs[_named("model.engram.rows_per_head", model.engram.rows_per_head)] = rows * float(
            table_params(config)
        )
    _compare(needs, device, "this device has")
    host = {
        _named("serve.queue", serve.queue): serve.queue * (_WAITING + _ID * capacity),
        _named("serve.host_cache", serve.host_cache): 0.0,
    }
    if serve.memory == DISK:
        host[_named("serve.host_cache", serve.host_cache)] = serve.host_cache * table_params(config)
    _compare(host, machine, "this machine has")


def _of_engine(config: Config, serve: ServeConfig, capacity: int, item: int) -> dict[str, float]:
    """Bytes by key of what the engine allocates or computes in at once (serve/engine_steps.py)."""
    model, attention = config.model, config.model.attention
    latent = attention.kv_lora_rank + attention.rope_dim
    each = -(-capacity // serve.page)
    pages = serve.pages or serve.sequences * each
    pool = float(pages) * serve.page * latent * item * model.layers + 40.0 * pages
    # Behind every kept beginning of a prompt, the convolutions' last inputs.
    taps = max(model.engram.conv_kernel - 1, 0) * max(model.engram.orders)
    tail = taps * model.hyper.streams * model.d_model * item * len(model.engram.layers)
    pool += float(tail) * serve.kept_prefixes(pages)
    # A step's streams, and for every head a token's scores against a page and its mixed latents.
    heads = attention.heads * (serve.page + attention.kv_lora_rank)
    one_token = 4.0 * (model.hyper.streams * model.d_model + heads)
    prefill = float(serve.prefill_sequences) * serve.prefill_chunk
    chunk = ("serve.prefill_chunk", serve.prefill_chunk)
    if serve.prefill_sequences > serve.prefill_chunk:
        chunk = ("serve.prefill_sequences", serve.prefill_sequences)
    slots = float(serve.sequences) * (one_token + 4.0 * config.tokenizer.vocab_size + 4.0 * each)
    sizes = {"capacity": capacity, "sequences": serve.sequences, "page": serve.page}
    if serve.pages:
        sizes = {"pages": serve.pages, "page": serve.page}
    largest = max(sizes, key=lambda key: sizes[key])
    return {
        _named(f"serve.{largest}", sizes[largest]): pool,
        _named(*chunk): prefill * one_token,
        _named("serve.sequences", serve.sequences) + " (decoded together)": slots,
    }


def _parameters(config: Config) -> tuple[float, float]:
    """(those of embedding and head, the others without the tables)."""
    return _traced(config.model, config.tokenizer)


@functools.lru_cache(maxsize=64)
def _traced(model: ModelConfig, tokenizer: TokenizerConfig) -> tuple[float, float]:
    counts = parts(Config(model=model, tokenizer=tokenizer))
    vocabulary = counts["token embedding"] + counts.get("output head", 0)
    return float(vocabulary), float(sum(counts.values()) - vocabulary)


def _named(key: str, value: object) -> str:
    return f"{key} = {value}"


def _compare(needs: Mapping[str, float], there: float, where: str) -> None:
    total = sum(needs.values())
    if total <= there:
        return
    largest = max(needs, key=lambda key: needs[key])
    rest = "" if len(needs) == 1 else f", {total / 1e9:,.1f} GB with what is beside it"
    raise UserError(
        f"config.{largest}: takes at least {needs[largest] / 1e9:,.1f} GB{rest}; {where}"
        f" {there / 1e9:,.1f} GB"
    )
