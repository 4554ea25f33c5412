"""Allowed values of the memories' keys, `model.engram` and `model.product_keys`.

Whether each key alone is positive, one of its choices and so on is in config/validate.py.
"""

from __future__ import annotations

from engram_jax.config.errors import require
from engram_jax.config.memory_schema import (
    CONTEXT,
    FP8,
    MAX_HEAD_SIZE,
    MAX_LOOKUPS,
    MAX_TABLE_ROWS,
    MODEL,
    OVER_ENCODING,
    QWEN,
    SCONE,
    SHUFFLED,
    SIGNS_PER_ORDER,
    EngramConfig,
    ProductKeyConfig,
)
from engram_jax.config.schema import Config, DataConfig, ModelConfig
from engram_jax.config.serving_schema import ServeConfig
from engram_jax.config.training_schema import (
    DENSE_ADAM,
    FROZEN,
)
from kernels_pallas.engram_gate.quantise import WIDTH


def validate_memory(config: Config) -> None:
    """Raises UserError for the first rule that is broken."""
    model, engram = config.model, config.model.engram
    _engram(engram, model.layers)
    _product_keys(model.product_keys, model.layers)
    if engram.layers:
        if engram.form == SCONE:
            _scone(engram, config.serve)
        if engram.form == OVER_ENCODING:
            off, why = (
                config.serve.off_layers,
                "whose module averages the token's own embedding, too",
            )
            only = f"() for model.engram.form = {OVER_ENCODING!r}, {why}"
            require(not off, "serve.off_layers", off, only)
        if engram.precision == FP8:
            _fp8(model)
        _lookups(config.data, engram.heads)
        _variants(engram, config.data.batch_size, config.train.samples)
        if engram.lookup == SHUFFLED:
            names, why = config.data.tasks.names, f"() for model.engram.lookup = {SHUFFLED!r}"
            alone = f"{why}: an item is scored by its own rows"
            require(not names, "data.tasks.names", names, alone)
    values = model.product_keys.layers and config.optimizer.memory_optimizer == FROZEN
    trained = f"another than {FROZEN!r} with product keys, whose values are trained all the same"
    require(not values, "optimizer.memory_optimizer", FROZEN, trained)
    if config.optimizer.memory_optimizer == DENSE_ADAM:
        dtype, only = engram.table_dtype, f"'float32' for {DENSE_ADAM}"
        require(dtype == "float32", "model.engram.table_dtype", dtype, only)


def _engram(engram: EngramConfig, layers: int) -> None:
    key, ids, orders = "model.engram", engram.layers, engram.orders
    require(
        all(0 <= i < layers for i in ids) and list(ids) == sorted(set(ids)),
        f"{key}.layers",
        ids,
        f"ascending 0-based layer ids below model.layers = {layers}",
    )
    require(
        len(orders) > 0 and orders == tuple(range(2, len(orders) + 2)),
        f"{key}.orders",
        orders,
        "consecutive n-gram orders from 2 up, such as (2, 3)",
    )
    heads = f"orders x heads_per_order = {len(orders)} x {engram.heads_per_order} = {engram.heads}"
    require(
        engram.d_mem % engram.heads == 0, f"{key}.d_mem", engram.d_mem, f"a multiple of {heads}"
    )
    rows = engram.rows_per_head
    counts = f"one number, or {len(orders)} (one per order)"
    require(len(rows) in (1, len(orders)), f"{key}.rows_per_head", rows, counts)
    if engram.hash_dialect == QWEN:
        require(
            len(set(rows)) == 1,
            f"{key}.rows_per_head",
            rows,
            f"one number for all orders in hash dialect {QWEN!r}",
        )
    require(
        all(2 <= r <= MAX_HEAD_SIZE for r in rows),
        f"{key}.rows_per_head",
        rows,
        f"in [2, {MAX_HEAD_SIZE}]",
    )
    table = sum(engram.base_rows) * engram.heads_per_order
    require(
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
            require(found == value, f"{key}.{name}", found, f"{value!r} {why}")
    if engram.lookup == SHUFFLED:
        why = f"for model.engram.lookup = {SHUFFLED!r}"
        even = f"even {why}: half of the sequences read the other half's rows"
        require(batch_size % 2 == 0, "data.batch_size", batch_size, even)
        require(not samples, "train.samples", samples, f"() {why}, which has no other sequence")
        require(not engram.signs, f"{key}.signs", True, f"False {why}")
    most = SIGNS_PER_ORDER
    per_order = engram.heads_per_order
    require(
        not engram.signs or per_order <= most,
        f"{key}.heads_per_order",
        per_order,
        f"at most {most} for model.engram.signs: one bit of a word for each head",
    )
    removed = "False where raw ids are hashed: nothing is removed from the token"
    require(not (engram.case and engram.hashes_raw_ids), f"{key}.case", engram.case, removed)


def _scone(engram: EngramConfig, serve: ServeConfig) -> None:
    """Frequent n-grams have no hash, no gate and no convolution: their keys are as by default."""
    unused = {"layers": (0,), "heads_per_order": 1}
    keys = ["hash_dialect", "seed", "conv_kernel", "precision", "fp8_recipe"]
    keys += ["gate", "multi_branch", "lookup", "signs", "compression", "case"]
    unused |= {key: getattr(EngramConfig(), key) for key in keys}
    for key, only in unused.items():
        value = getattr(engram, key)
        require(value == only, f"model.engram.{key}", value, f"{only!r} in form {SCONE!r}")
    std, why = engram.init_std, f"positive in form {SCONE!r}, where a row of zeros is none"
    require(std > 0, "model.engram.init_std", std, why)
    rows, one = engram.rows_per_head, f"one number in form {SCONE!r}, for all orders together"
    require(len(rows) == 1, "model.engram.rows_per_head", rows, one)
    none = f"() in form {SCONE!r}: a row is of the longest n-gram"
    require(not serve.off_orders, "serve.off_orders", serve.off_orders, none)


def _fp8(model: ModelConfig) -> None:
    key, recipe = "model.engram.precision", model.engram.fp8_recipe
    require(model.dtype != "float64", key, FP8, "'model' for model.dtype = 'float64'")
    width = WIDTH.get(recipe, 1)
    sizes = f"d_model = {model.d_model} and d_mem = {model.engram.d_mem}"
    require(
        model.d_model % width == model.engram.d_mem % width == 0,
        "model.engram.fp8_recipe",
        recipe,
        f"one whose blocks of {width} columns divide {sizes}",
    )


def _product_keys(memory: ProductKeyConfig, layers: int) -> None:
    key, ids = "model.product_keys", memory.layers
    require(
        all(0 <= i < layers for i in ids) and list(ids) == sorted(set(ids)),
        f"{key}.layers",
        ids,
        f"ascending 0-based layer ids below model.layers = {layers}",
    )
    require(memory.key_dim % 2 == 0, f"{key}.key_dim", memory.key_dim, "even (two sub-keys)")
    few = f"at most model.product_keys.sub_keys = {memory.sub_keys}"
    require(memory.top_k <= memory.sub_keys, f"{key}.top_k", memory.top_k, few)
    divisor = f"a divisor of model.product_keys.sub_keys = {memory.sub_keys}"
    require(memory.sub_keys % memory.expansion == 0, f"{key}.expansion", memory.expansion, divisor)
    read = memory.heads * memory.top_k
    require(
        read <= memory.rows <= MAX_TABLE_ROWS,
        f"{key}.sub_keys",
        memory.sub_keys,
        f"so that the sub_keys^2 / expansion stored values are from {read} (heads x top_k, which a"
        f" token reads) to {MAX_TABLE_ROWS} (int32)",
    )


def _lookups(data: DataConfig, heads: int) -> None:
    most = MAX_LOOKUPS // (data.seq_len * heads)
    require(
        data.batch_size <= most,
        "data.batch_size",
        data.batch_size,
        f"at most {most}: a step of data.seq_len = {data.seq_len} and {heads} heads looks up at"
        f" most {MAX_LOOKUPS} rows per table",
    )
