"""Validates a configuration before anything is read or built.

An error is one line that names the key, its value and what is allowed. Rules that depend on the
data or the tokenizer (its size, its compression, the exact primes) are checked where these are
read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from engram_jax.config.errors import UserError
from engram_jax.config.schema import (
    ALL_LAYERS,
    BF16,
    CONTEXT,
    DENSE_ADAM,
    DEVICE,
    DIFFICULTIES,
    DISK,
    FP8,
    FROZEN,
    HASHED,
    HOST,
    LEARNED,
    MAX_HEAD_SIZE,
    MAX_LOOKUPS,
    MAX_TABLE_ROWS,
    MODEL,
    ONE,
    ONE_ROW,
    OVER_ENCODING,
    PAPER,
    QWEN,
    ROWWISE_ADAM,
    SCONE,
    SHUFFLED,
    SIGNS_PER_ORDER,
    TASKS,
    V41,
    Config,
    DataConfig,
    EngramConfig,
    FeedForwardConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerConfig,
    ProductKeyConfig,
    ServeConfig,
    TasksConfig,
    TokenizerConfig,
    TrainConfig,
)
from kernels_pallas.dispatch import IMPLEMENTATIONS
from kernels_pallas.engram_gate.quantise import RECIPES, WIDTH

# Section -> keys, of ints and floats.
_POSITIVE = {
    "model": "d_model layers norm_eps init_std",
    "model.attention": "heads kv_lora_rank nope_dim rope_dim v_dim rope_theta",
    "model.ffn": "dense_dim routed_scaling",
    "model.hyper": "streams sinkhorn_iterations",
    "model.engram": "heads_per_order d_mem",
    "model.product_keys": "sub_keys key_dim heads top_k dim expansion",
    "tokenizer": "vocab_size",
    "mesh": "data expert tensor headroom",
    "data": "seq_len batch_size text_key",
    "data.tasks": "test_items",
    "optimizer": "peak_lr clip_norm muon_ns_steps muon_rms adam_eps",
    "train": "steps accumulation log_every eval_every eval_batches checkpoint_every keep"
    " sample_tokens",
    "generate": "max_tokens",
    "serve": "sequences page prefill_chunk prefill_sequences queue max_body host",
}
_NOT_NEGATIVE = {
    "model.ffn": "routed_experts shared_experts bias_update_rate",
    "model.hyper": "eps",
    "model.engram": "conv_kernel init_std seed",
    "mesh": "fsdp distinct",
    "data": "max_megabytes workers near_duplicates",
    "optimizer": "warmup_steps weight_decay memory_lr_multiplier",
    "train": "keep_best seen_tokens hang_seconds",
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
_SEEDS = ("data.seed", "data.tasks.seed", "train.seed", "generate.seed")
_MAY_BE_INFINITE = ("optimizer.clip_norm",)  # no clipping


def validate(config: Config) -> None:
    """Raises UserError for the first rule that is broken."""
    for key, value in _leaves(config):
        finite = not isinstance(value, float) or math.isfinite(value)
        endless = key in _MAY_BE_INFINITE and value == math.inf
        _require(finite or endless, key, value, "a finite number")
    for section, keys in _POSITIVE.items():
        for key in keys.split():
            value = _get(config, f"{section}.{key}")
            if isinstance(value, str):
                _require(bool(value), f"{section}.{key}", value, "not empty")
            else:
                _require(value > 0, f"{section}.{key}", value, "positive")
    for section, keys in _NOT_NEGATIVE.items():
        for key in keys.split():
            value = _get(config, f"{section}.{key}")
            _require(value >= 0, f"{section}.{key}", value, "0 or more")
    for key, choices in _CHOICES.items():
        _require(_get(config, key) in choices, key, _get(config, key), _one_of(choices))
    for key in _SEEDS:
        _require(0 <= _get(config, key) < 2**32, key, _get(config, key), "in [0, 2**32)")
    _require(
        re.fullmatch(r"\w[\w.+-]*", config.name) is not None,
        "name",
        config.name,
        "letters, digits, '.', '_', '+' or '-' (it names the run's folder)",
    )
    model = config.model
    rope = model.attention.rope_dim
    _require(rope % 2 == 0, "model.attention.rope_dim", rope, "even (RoPE rotates pairs)")
    _feed_forward(model.ffn, model.layers)
    _engram(model.engram, model.layers)
    if model.engram.layers and model.engram.form == SCONE:
        _scone(model.engram, config.serve)
    if model.engram.layers and model.engram.precision == FP8:
        _fp8(model)
    _product_keys(model.product_keys, model.layers)
    _tokenizer(config.tokenizer, restarts=bool(model.engram.layers) and _is_qwen(model.engram))
    share = config.mesh.distinct
    _require(share <= 1, "mesh.distinct", share, "a share of the lookups, in [0, 1]")
    _data(config.data)
    if model.engram.layers:
        _lookups(config.data, model.engram.heads)
        _variants(model.engram, config.data.batch_size, config.train.samples)
    _optimizer(config.optimizer)
    if config.optimizer.memory_optimizer == DENSE_ADAM:
        dtype = model.engram.table_dtype
        _require(
            dtype == "float32", "model.engram.table_dtype", dtype, f"'float32' for {DENSE_ADAM}"
        )
    _train(config.train, config.data.batch_size)
    _generate(config.generate, config.tokenizer.vocab_size)
    _serve(config.serve, config.model.engram)


def _feed_forward(ffn: FeedForwardConfig, layers: int) -> None:
    key = "model.ffn"
    moe = ffn.routed_experts > 0
    highest = layers - 1 if moe else layers
    _require(
        0 <= ffn.dense_layers <= highest,
        f"{key}.dense_layers",
        ffn.dense_layers,
        f"in [0, {highest}]: model.layers = {layers}"
        + (f", and the {ffn.routed_experts} routed experts need a layer" if moe else ""),
    )
    if not moe:
        return
    _require(ffn.expert_dim > 0, f"{key}.expert_dim", ffn.expert_dim, "positive")
    _require(
        0 < ffn.top_k <= ffn.routed_experts,
        f"{key}.top_k",
        ffn.top_k,
        f"in [1, {ffn.routed_experts}]: model.ffn.routed_experts = {ffn.routed_experts}",
    )


def _engram(engram: EngramConfig, layers: int) -> None:
    key, ids, orders = "model.engram", engram.layers, engram.orders
    _require(
        all(0 <= i < layers for i in ids) and list(ids) == sorted(set(ids)),
        f"{key}.layers",
        ids,
        f"ascending 0-based layer ids below model.layers = {layers}",
    )
    _require(
        len(orders) > 0 and orders == tuple(range(2, len(orders) + 2)),
        f"{key}.orders",
        orders,
        "consecutive n-gram orders from 2 up, such as (2, 3)",
    )
    heads = f"orders x heads_per_order = {len(orders)} x {engram.heads_per_order} = {engram.heads}"
    _require(
        engram.d_mem % engram.heads == 0, f"{key}.d_mem", engram.d_mem, f"a multiple of {heads}"
    )
    rows = engram.rows_per_head
    counts = f"one number, or {len(orders)} (one per order)"
    _require(len(rows) in (1, len(orders)), f"{key}.rows_per_head", rows, counts)
    if _is_qwen(engram):
        _require(
            len(set(rows)) == 1,
            f"{key}.rows_per_head",
            rows,
            f"one number for all orders in hash dialect {QWEN!r}",
        )
    _require(
        all(2 <= r <= MAX_HEAD_SIZE for r in rows),
        f"{key}.rows_per_head",
        rows,
        f"in [2, {MAX_HEAD_SIZE}]",
    )
    table = sum(engram.base_rows) * engram.heads_per_order
    _require(
        table <= MAX_TABLE_ROWS,
        f"{key}.rows_per_head",
        rows,
        f"at most {MAX_TABLE_ROWS} rows over all {engram.heads} heads (addresses are int32, and"
        " the highest are no rows);"
        f" this is {table}",
    )


def _variants(engram: EngramConfig, batch_size: int, samples: tuple[str, ...]) -> None:
    """Switches of the memory's variants (docs/models.md) that exclude each other."""
    key = "model.engram"
    if engram.form == OVER_ENCODING:
        why = f"for model.engram.form = {OVER_ENCODING!r}"
        fixed = {"layers": (0,), "gate": CONTEXT, "multi_branch": True, "precision": MODEL}
        for name, value in fixed.items():
            found = getattr(engram, name)
            _require(found == value, f"{key}.{name}", found, f"{value!r} {why}")
    if engram.lookup == SHUFFLED:
        why = f"for model.engram.lookup = {SHUFFLED!r}"
        even = f"even {why}: half of the sequences read the other half's rows"
        _require(batch_size % 2 == 0, "data.batch_size", batch_size, even)
        _require(not samples, "train.samples", samples, f"() {why}, which has no other sequence")
        _require(not engram.signs, f"{key}.signs", True, f"False {why}")
    most = SIGNS_PER_ORDER
    per_order = engram.heads_per_order
    _require(
        not engram.signs or per_order <= most,
        f"{key}.heads_per_order",
        per_order,
        f"at most {most} for model.engram.signs: one bit of a word for each head",
    )
    removed = "False where raw ids are hashed: nothing is removed from the token"
    _require(not (engram.case and engram.hashes_raw_ids), f"{key}.case", engram.case, removed)


def _scone(engram: EngramConfig, serve: ServeConfig) -> None:
    """Frequent n-grams have no hash, no gate and no convolution: their keys are as by default."""
    unused = {"layers": (0,), "heads_per_order": 1}
    keys = ["hash_dialect", "seed", "conv_kernel", "precision", "fp8_recipe"]
    keys += ["gate", "multi_branch", "lookup", "signs", "compression", "case"]
    unused |= {key: getattr(EngramConfig(), key) for key in keys}
    for key, only in unused.items():
        value = getattr(engram, key)
        _require(value == only, f"model.engram.{key}", value, f"{only!r} in form {SCONE!r}")
    std, why = engram.init_std, f"positive in form {SCONE!r}, where a row of zeros is none"
    _require(std > 0, "model.engram.init_std", std, why)
    rows, one = engram.rows_per_head, f"one number in form {SCONE!r}, for all orders together"
    _require(len(rows) == 1, "model.engram.rows_per_head", rows, one)
    none = f"() in form {SCONE!r}: a row is of the longest n-gram"
    _require(not serve.off_orders, "serve.off_orders", serve.off_orders, none)


def _fp8(model: ModelConfig) -> None:
    key, recipe = "model.engram.precision", model.engram.fp8_recipe
    _require(model.dtype != "float64", key, FP8, "'model' for model.dtype = 'float64'")
    width = WIDTH.get(recipe, 1)
    sizes = f"d_model = {model.d_model} and d_mem = {model.engram.d_mem}"
    _require(
        model.d_model % width == model.engram.d_mem % width == 0,
        "model.engram.fp8_recipe",
        recipe,
        f"one whose blocks of {width} columns divide {sizes}",
    )


def _product_keys(memory: ProductKeyConfig, layers: int) -> None:
    key, ids = "model.product_keys", memory.layers
    _require(
        all(0 <= i < layers for i in ids) and list(ids) == sorted(set(ids)),
        f"{key}.layers",
        ids,
        f"ascending 0-based layer ids below model.layers = {layers}",
    )
    _require(memory.key_dim % 2 == 0, f"{key}.key_dim", memory.key_dim, "even (two sub-keys)")
    few = f"at most model.product_keys.sub_keys = {memory.sub_keys}"
    _require(memory.top_k <= memory.sub_keys, f"{key}.top_k", memory.top_k, few)
    divisor = f"a divisor of model.product_keys.sub_keys = {memory.sub_keys}"
    _require(memory.sub_keys % memory.expansion == 0, f"{key}.expansion", memory.expansion, divisor)
    read = memory.heads * memory.top_k
    _require(
        read <= memory.rows <= MAX_TABLE_ROWS,
        f"{key}.sub_keys",
        memory.sub_keys,
        f"so that the sub_keys^2 / expansion stored values are from {read} (heads x top_k, which a"
        f" token reads) to {MAX_TABLE_ROWS} (int32)",
    )


def _is_qwen(engram: EngramConfig) -> bool:
    return engram.hash_dialect == QWEN


def _tokenizer(tokens: TokenizerConfig, restarts: bool) -> None:
    """restarts: the hash's history restarts at `eos_id`."""
    key, vocab = "tokenizer", tokens.vocab_size
    _require(0 <= tokens.pad_id < vocab, f"{key}.pad_id", tokens.pad_id, f"in [0, {vocab})")
    lowest = 0 if restarts else -1
    why = f": hash dialect {QWEN!r} restarts there" if restarts else ""
    _require(
        lowest <= tokens.eos_id < vocab,
        f"{key}.eos_id",
        tokens.eos_id,
        f"in [{lowest}, {vocab}){why}",
    )
    size = tokens.canonical_vocab_size
    _require(
        0 <= size <= vocab,
        f"{key}.canonical_vocab_size",
        size,
        f"in [0, {vocab}] (0 = whatever the tokenizer compresses to)",
    )


def _data(data: DataConfig) -> None:
    if data.source == "local":
        allowed = "empty for data.source = 'local'; for text of your own set data.source=folder"
        _require(not data.path, "data.path", data.path, allowed)
    else:
        what = "the folder" if data.source == "folder" else "the name of the TFDS data set"
        _require(bool(data.path), "data.path", data.path, f"{what} (data.source = {data.source!r})")
    fraction, longest = data.validation_fraction, data.max_document_bytes
    _require(0 < fraction < 1, "data.validation_fraction", fraction, "between 0 and 1")
    _require(longest >= 64, "data.max_document_bytes", longest, "64 or more")
    similar = data.near_duplicates
    _require(similar <= 1, "data.near_duplicates", similar, "a Jaccard similarity, in [0, 1]")
    whole = similar == 0 or data.source != "tfds"
    _require(whole, "data.near_duplicates", similar, "0 for data.source = 'tfds'")
    _tasks(data.tasks)


def _tasks(tasks: TasksConfig) -> None:
    key = "data.tasks"
    if not tasks.names:
        for field in dataclasses.fields(tasks):
            value = getattr(tasks, field.name)
            default = field.name == "names" or value == field.default
            _require(default, f"{key}.{field.name}", value, f"left out while {key}.names is empty")
        return
    for name, allowed in (("names", TASKS), ("difficulties", DIFFICULTIES)):
        chosen = getattr(tasks, name)
        known = chosen and all(c in allowed for c in chosen) and len(set(chosen)) == len(chosen)
        _require(bool(known), f"{key}.{name}", chosen, f"different ones of {', '.join(allowed)}")
    _require(0 < tasks.share < 1, f"{key}.share", tasks.share, "between 0 and 1")
    times = tasks.frequencies
    rising = times and min(times) > 0 and list(times) == sorted(set(times))
    _require(bool(rising), f"{key}.frequencies", times, "ascending numbers of times, from 1 up")
    unused = times == TasksConfig().frequencies or "facts" in tasks.names
    _require(unused, f"{key}.frequencies", times, "left out without 'facts' in data.tasks.names")


def _lookups(data: DataConfig, heads: int) -> None:
    most = MAX_LOOKUPS // (data.seq_len * heads)
    _require(
        data.batch_size <= most,
        "data.batch_size",
        data.batch_size,
        f"at most {most}: a step of data.seq_len = {data.seq_len} and {heads} heads looks up at"
        f" most {MAX_LOOKUPS} rows per table",
    )


def _optimizer(optimizer: OptimizerConfig) -> None:
    key = "optimizer"
    for name in ("muon_momentum", "adam_b1", "adam_b2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"{key}.{name}", value, "in [0, 1)")
    at, factors = optimizer.decay_at, optimizer.decay_factors
    _require(
        all(0 <= a <= 1 for a in at) and list(at) == sorted(set(at)),
        f"{key}.decay_at",
        at,
        "ascending fractions of train.steps, in [0, 1]",
    )
    _require(
        len(factors) == len(at) and all(f >= 0 for f in factors),
        f"{key}.decay_factors",
        factors,
        f"factors of 0 or more, one for each of optimizer.decay_at = {at}",
    )


def _train(train: TrainConfig, batch_size: int) -> None:
    parts = train.accumulation
    divisor = f"a divisor of data.batch_size = {batch_size}"
    _require(batch_size % parts == 0, "train.accumulation", parts, divisor)
    unbroken = all(p.encode(errors="replace").decode() == p for p in train.samples)
    prompts = "prompts that are not empty, in UTF-8"
    _require(all(train.samples) and unbroken, "train.samples", train.samples, prompts)


def _generate(generate: GenerateConfig, vocab: int) -> None:
    _require(0 < generate.top_p <= 1, "generate.top_p", generate.top_p, "in (0, 1]")
    whole = f"in [0, {vocab}] (tokenizer.vocab_size; 0 = all)"
    _require(0 <= generate.top_k <= vocab, "generate.top_k", generate.top_k, whole)


def _serve(serve: ServeConfig, engram: EngramConfig) -> None:
    one = -(-serve.capacity // serve.page)  # 0 if the checkpoint decides the capacity
    room = f"0, or at least the {one} of one sequence (serve.capacity / serve.page)"
    _require(serve.pages == 0 or serve.pages >= one, "serve.pages", serve.pages, room)
    several = serve.prefill_sequences <= serve.sequences
    at_most = f"at most serve.sequences = {serve.sequences}"
    _require(several, "serve.prefill_sequences", serve.prefill_sequences, at_most)
    _require(0 <= serve.port < 2**16, "serve.port", serve.port, "from 0 to 65535")
    for key in ("device_cache", "host_cache"):
        share = getattr(serve, key)
        _require(share <= 1, f"serve.{key}", share, "a share of the rows, from 0 to 1")
        off_device = share == 0 or serve.memory != DEVICE
        _require(off_device, f"serve.{key}", share, "0 with serve.memory = 'device'")
    on_disk = serve.host_cache == 0 or serve.memory == DISK
    _require(on_disk, "serve.host_cache", serve.host_cache, "0 unless serve.memory = 'disk'")
    needs_file = serve.memory != DISK or serve.memory_file
    a_file = "what --mode=export-memory wrote, for serve.memory = 'disk'"
    _require(bool(needs_file), "serve.memory_file", "", a_file)
    read = bool(engram.layers) or not serve.memory_file
    _require(read, "serve.memory_file", serve.memory_file, "'' for a model without Engram layers")
    counted = serve.device_cache == 0 or serve.frequency_file
    a_file = "what --mode=count-memory wrote, for serve.device_cache"
    _require(bool(counted), "serve.frequency_file", "", a_file)
    layers = (*engram.layers, ALL_LAYERS)
    for layer in serve.off_layers:
        _require(layer in layers, "serve.off_layers", layer, f"among {layers} (-1 = all)")
    for order in serve.off_orders:
        allowed = f"among model.engram.orders = {engram.orders}"
        _require(order in engram.orders, "serve.off_orders", order, allowed)


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


def _one_of(choices: Sequence[str]) -> str:
    return "one of " + ", ".join(repr(choice) for choice in choices)


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"config.{key} = {value!r}: must be {allowed}")
