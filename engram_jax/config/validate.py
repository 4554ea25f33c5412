"""Validates a configuration before anything is read or built.

An error is one line that names the key, its value and what is allowed. Rules that depend on the
data or the tokenizer (its size, its compression, the exact primes) are checked where these are
read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from engram_jax.config.errors import one_of, require
from engram_jax.config.memory_schema import (
    BF16,
    CONTEXT,
    FP8,
    HASHED,
    LEARNED,
    MODEL,
    ONE,
    ONE_ROW,
    OVER_ENCODING,
    PAPER,
    QWEN,
    SCONE,
    SHUFFLED,
    V41,
)
from engram_jax.config.schema import (
    DIFFICULTIES,
    EXPERTS,
    KEPT,
    TASKS,
    Config,
    DataConfig,
    FeedForwardConfig,
    GenerateConfig,
    TasksConfig,
    TokenizerConfig,
    YarnConfig,
)
from engram_jax.config.serving_schema import DEVICE, DISK, HOST, SECRETS
from engram_jax.config.training_schema import (
    DENSE_ADAM,
    FROZEN,
    ROWWISE_ADAM,
    OptimizerConfig,
    TrainConfig,
)
from engram_jax.config.validate_memory import validate_memory
from engram_jax.config.validate_serving import validate_serving
from engram_jax.config.validate_training import validate_training
from kernels_pallas.dispatch import IMPLEMENTATIONS
from kernels_pallas.engram_gate.quantise import RECIPES

# Section -> keys, of ints and floats.
_POSITIVE = {
    "model": "d_model layers norm_eps init_std",
    "model.attention": "heads kv_lora_rank nope_dim rope_dim v_dim rope_theta",
    "model.attention.yarn": "original_length alpha",
    "model.ffn": "dense_dim routed_scaling",
    "model.hyper": "streams sinkhorn_iterations",
    "model.engram": "heads_per_order d_mem",
    "model.product_keys": "sub_keys key_dim heads top_k dim expansion",
    "tokenizer": "vocab_size",
    "mesh": "data expert sequence tensor headroom",
    "data": "seq_len batch_size text_key",
    "data.tasks": "test_items",
    "optimizer": "peak_lr clip_norm muon_ns_steps muon_rms adam_eps",
    "train": "steps accumulation log_every eval_every eval_batches checkpoint_every keep"
    " sample_tokens",
    "generate": "max_tokens",
    "serve": "sequences page prefill_chunk prefill_sequences queue max_body max_answer host",
}
_NOT_NEGATIVE = {
    "model.attention.yarn": "mscale",
    "model.ffn": "routed_experts shared_experts bias_update_rate",
    "model.hyper": "eps",
    "model.engram": "conv_kernel init_std seed",
    "mesh": "fsdp distinct",
    "data": "max_megabytes workers near_duplicates long_share",
    "optimizer": "warmup_steps weight_decay memory_lr_multiplier decay_steps decay_share min_rate",
    "train": "keep_best seen_tokens hang_seconds ema_decay z_loss",
    "generate": "temperature",
    "serve": "capacity pages device_cache host_cache drain_seconds",
}
_CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float64"),
    "model.param_dtype": ("float32", "float64"),
    "model.remat": ("none", "block", "dots"),
    "model.hyper.start": ("identity", "uniform"),
    "model.engram.form": (PAPER, V41, QWEN, OVER_ENCODING, SCONE),
    "model.engram.gate": (CONTEXT, ONE, LEARNED),
    "model.engram.lookup": (HASHED, ONE_ROW, SHUFFLED),
    "model.engram.hash_dialect": (PAPER, QWEN),
    "model.engram.addresses": ("device", "host"),
    "model.engram.table_dtype": ("float32", "bfloat16"),
    "model.engram.precision": (MODEL, BF16, FP8),
    "model.engram.fp8_recipe": RECIPES,
    "model.kernels": IMPLEMENTATIONS,
    "serve.memory": (DEVICE, HOST, DISK),
    "data.source": ("local", "folder", "tfds"),
    "optimizer.memory_optimizer": (ROWWISE_ADAM, DENSE_ADAM, FROZEN),
}
# The program repeats these in its compiled steps, so that compiling takes time and memory for each.
_AT_MOST = {
    "model.hyper.sinkhorn_iterations": 1000,
    "optimizer.muon_ns_steps": 100,
    "model.engram.conv_kernel": 1024,
    "model.hyper.streams": 1024,
    "model.layers": 10_000,
    "data.workers": 1024,
}
# Whole numbers are int32 in compiled programs and in NumPy's sizes, except for these.
_MAY_BE_LONG = (
    *("data.max_document_bytes", "data.max_megabytes", "data.seed", "data.tasks.seed"),
    *("train.seed", "generate.seed", "train.seen_tokens", "serve.max_body", "model.engram.seed"),
)
_SEEDS = ("data.seed", "data.tasks.seed", "train.seed", "generate.seed")
_MAY_BE_INFINITE = ("optimizer.clip_norm",)  # no clipping


def validate(config: Config) -> None:
    """Raises UserError for the first rule that is broken."""
    for key, value in _leaves(config):
        finite = not isinstance(value, float) or math.isfinite(value)
        endless = key in _MAY_BE_INFINITE and value == math.inf
        require(finite or endless, key, value, "a finite number")
        if type(value) is int:
            bits = 62 if key in _MAY_BE_LONG else 31
            require(abs(value) < 1 << bits, key, value, f"below 2**{bits}")
        if isinstance(value, str) and key not in SECRETS:
            require("\0" not in value, key, value, "text without a NUL character")
    for section, keys in _POSITIVE.items():
        for key in keys.split():
            value = _get(config, f"{section}.{key}")
            if isinstance(value, str):
                require(bool(value), f"{section}.{key}", value, "not empty")
            else:
                require(value > 0, f"{section}.{key}", value, "positive")
    for section, keys in _NOT_NEGATIVE.items():
        for key in keys.split():
            value = _get(config, f"{section}.{key}")
            require(value >= 0, f"{section}.{key}", value, "0 or more")
    for key, most in _AT_MOST.items():
        require(_get(config, key) <= most, key, _get(config, key), f"at most {most}")
    for key, choices in _CHOICES.items():
        require(_get(config, key) in choices, key, _get(config, key), one_of(choices))
    for key in _SEEDS:
        require(0 <= _get(config, key) < 2**32, key, _get(config, key), "in [0, 2**32)")
    require(
        re.fullmatch(r"\w[\w.+-]*", config.name) is not None,
        "name",
        config.name,
        "letters, digits, '.', '_', '+' or '-' (it names the run's folder)",
    )
    model = config.model
    rope = model.attention.rope_dim
    require(rope % 2 == 0, "model.attention.rope_dim", rope, "even (RoPE rotates pairs)")
    _kept(config)
    _yarn(model.attention.yarn)
    _feed_forward(model.ffn, model.layers)
    validate_memory(config)
    qwen = model.engram.hash_dialect == QWEN
    _tokenizer(config.tokenizer, restarts=bool(model.engram.layers) and qwen)
    share = config.mesh.distinct
    require(share <= 1, "mesh.distinct", share, "a share of the lookups, in [0, 1]")
    _data(config.data)
    _optimizer(config.optimizer)
    _train(config.train, config.data.batch_size)
    validate_training(config)
    _generate(config.generate, config.tokenizer.vocab_size)
    validate_serving(config.serve, config.model.engram)


def _kept(config: Config) -> None:
    model, key = config.model, "model.kept"
    if model.kept:
        require(model.remat == "block", key, model.kept, "left out without model.remat = 'block'")
    known = set(model.kept) <= set(KEPT) and len(set(model.kept)) == len(model.kept)
    require(known, key, model.kept, f"different ones of {', '.join(KEPT)}")
    if EXPERTS in model.kept:
        routed = model.ffn.routed_experts
        require(routed > 0, key, model.kept, f"without '{EXPERTS}' in a model without experts")
        several = config.mesh.expert
        allowed = f"without '{EXPERTS}' where mesh.expert = {several} exchanges tokens"
        require(several == 1, key, model.kept, allowed)


def _yarn(yarn: YarnConfig) -> None:
    key = "model.attention.yarn"
    require(yarn.scale >= 1, f"{key}.scale", yarn.scale, "1 (no extension) or more")
    require(yarn.beta > yarn.alpha, f"{key}.beta", yarn.beta, f"above {key}.alpha = {yarn.alpha}")


def _feed_forward(ffn: FeedForwardConfig, layers: int) -> None:
    key = "model.ffn"
    moe = ffn.routed_experts > 0
    highest = layers - 1 if moe else layers
    require(
        0 <= ffn.dense_layers <= highest,
        f"{key}.dense_layers",
        ffn.dense_layers,
        f"in [0, {highest}]: model.layers = {layers}"
        + (f", and the {ffn.routed_experts} routed experts need a layer" if moe else ""),
    )
    if not moe:
        # A model with experts whose number is set to 0 keeps its other keys, and is dense.
        meant = ffn.shared_experts == 0 or ffn.top_k > 0
        only = "0 without routed experts: model.ffn.routed_experts = 0 makes every layer dense"
        require(meant, f"{key}.shared_experts", ffn.shared_experts, only)
        return
    require(ffn.expert_dim > 0, f"{key}.expert_dim", ffn.expert_dim, "positive")
    require(
        0 < ffn.top_k <= ffn.routed_experts,
        f"{key}.top_k",
        ffn.top_k,
        f"in [1, {ffn.routed_experts}]: model.ffn.routed_experts = {ffn.routed_experts}",
    )


def _tokenizer(tokens: TokenizerConfig, restarts: bool) -> None:
    """restarts: the hash's history restarts at `eos_id`."""
    key, vocab = "tokenizer", tokens.vocab_size
    require(0 <= tokens.pad_id < vocab, f"{key}.pad_id", tokens.pad_id, f"in [0, {vocab})")
    lowest = 0 if restarts else -1
    why = f": hash dialect {QWEN!r} restarts there" if restarts else ""
    require(
        lowest <= tokens.eos_id < vocab,
        f"{key}.eos_id",
        tokens.eos_id,
        f"in [{lowest}, {vocab}){why}",
    )
    size = tokens.canonical_vocab_size
    require(
        0 <= size <= vocab,
        f"{key}.canonical_vocab_size",
        size,
        f"in [0, {vocab}] (0 = whatever the tokenizer compresses to)",
    )


def _data(data: DataConfig) -> None:
    if data.source == "local":
        allowed = "empty for data.source = 'local'; for text of your own set data.source=folder"
        require(not data.path, "data.path", data.path, allowed)
    else:
        what = "the folder" if data.source == "folder" else "the name of the TFDS data set"
        require(bool(data.path), "data.path", data.path, f"{what} (data.source = {data.source!r})")
    fraction, longest = data.validation_fraction, data.max_document_bytes
    require(0 < fraction < 1, "data.validation_fraction", fraction, "between 0 and 1")
    require(longest >= 64, "data.max_document_bytes", longest, "64 or more")
    similar = data.near_duplicates
    require(similar <= 1, "data.near_duplicates", similar, "a Jaccard similarity, in [0, 1]")
    whole = similar == 0 or data.source != "tfds"
    require(whole, "data.near_duplicates", similar, "0 for data.source = 'tfds'")
    share = data.long_share
    require(share < 1, "data.long_share", share, "less than 1")
    require(data.keep_long or not share, "data.long_share", share, "0 without data.keep_long")
    _tasks(data.tasks)


def _tasks(tasks: TasksConfig) -> None:
    key = "data.tasks"
    if not tasks.names:
        for field in dataclasses.fields(tasks):
            value = getattr(tasks, field.name)
            default = field.name == "names" or value == field.default
            require(default, f"{key}.{field.name}", value, f"left out while {key}.names is empty")
        return
    for name, allowed in (("names", TASKS), ("difficulties", DIFFICULTIES)):
        chosen = getattr(tasks, name)
        known = chosen and all(c in allowed for c in chosen) and len(set(chosen)) == len(chosen)
        require(bool(known), f"{key}.{name}", chosen, f"different ones of {', '.join(allowed)}")
    require(0 < tasks.share < 1, f"{key}.share", tasks.share, "between 0 and 1")
    times = tasks.frequencies
    rising = times and min(times) > 0 and list(times) == sorted(set(times))
    require(bool(rising), f"{key}.frequencies", times, "ascending numbers of times, from 1 up")
    unused = times == TasksConfig().frequencies or "facts" in tasks.names
    require(unused, f"{key}.frequencies", times, "left out without 'facts' in data.tasks.names")


def _optimizer(optimizer: OptimizerConfig) -> None:
    key = "optimizer"
    for name in ("muon_momentum", "adam_b1", "adam_b2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"{key}.{name}", value, "in [0, 1)")
    at, factors = optimizer.decay_at, optimizer.decay_factors
    require(
        all(0 <= a <= 1 for a in at) and list(at) == sorted(set(at)),
        f"{key}.decay_at",
        at,
        "ascending fractions of train.steps, in [0, 1]",
    )
    require(
        (optimizer.decay_at_steps or len(factors) == len(at)) and all(f >= 0 for f in factors),
        f"{key}.decay_factors",
        factors,
        f"factors of 0 or more, one for each of optimizer.decay_at = {at}",
    )


def _train(train: TrainConfig, batch_size: int) -> None:
    parts = train.accumulation
    divisor = f"a divisor of data.batch_size = {batch_size}"
    require(batch_size % parts == 0, "train.accumulation", parts, divisor)
    unbroken = all(p.encode(errors="replace").decode() == p for p in train.samples)
    prompts = "prompts that are not empty, in UTF-8"
    require(all(train.samples) and unbroken, "train.samples", train.samples, prompts)


def _generate(generate: GenerateConfig, vocab: int) -> None:
    require(0 < generate.top_p <= 1, "generate.top_p", generate.top_p, "in (0, 1]")
    whole = f"in [0, {vocab}] (tokenizer.vocab_size; 0 = all)"
    require(0 <= generate.top_k <= vocab, "generate.top_k", generate.top_k, whole)


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every key; a tuple's items separately."""
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield from ((key, item) for item in (value if isinstance(value, tuple) else (value,)))


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
