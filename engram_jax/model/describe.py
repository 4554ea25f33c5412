"""Parameter counts, FLOPs and table sizes of a configuration, without allocating anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from engram_jax.addressing import artifact, load_tokenizer, plan_layer
from engram_jax.addressing.fgrams import FgramAddressing
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.config import Config, ProductKeyConfig
from engram_jax.model.transformer import Transformer
from engram_jax.sharding.parameters import VALUES, part_of
from engram_jax.sharding.rules import names


def abstract_parameters(config: Config) -> dict[str, Any]:
    """The parameter tree with shapes and dtypes only."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def parts(config: Config) -> dict[str, int]:
    """Parameters by part of the model, tables included."""
    counts: dict[str, int] = {}

    def add(path: Any, leaf: Any) -> None:
        part = part_of(names(path), len(leaf.shape))
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)

    jax.tree_util.tree_map_with_path(add, abstract_parameters(config))
    return counts


def flops_per_token(config: Config, matrix_params: int) -> float:
    """Training FLOPs per token: 6 per weight it is multiplied with, and causal attention.

    Forward 2, backward 4 per weight; a token attends to (seq_len + 1) / 2 tokens on average.
    Lookups, norms and other element-wise work are not counted, nor is rematerialisation.
    """
    model, attention = config.model, config.model.attention
    widths = attention.nope_dim + attention.rope_dim + attention.v_dim
    context = (config.data.seq_len + 1) / 2
    return 6.0 * matrix_params + 6.0 * model.layers * attention.heads * widths * context


def active_params(config: Config, counts: dict[str, int]) -> int:
    """Weights a token is multiplied with, without the token embedding, of which one row is looked
    up, and the vectors of case, of which another is. counts: from `parts`."""
    looked_up = counts["token embedding"] + counts.get("engram case vectors", 0)
    idle = idle_experts(config, counts) + _idle_values(config, counts)
    return sum(counts.values()) - looked_up - idle


def training_flops(config: Config, counts: dict[str, int] | None = None) -> float:
    """Training FLOPs per token of the whole model, see `flops_per_token`.

    counts: from `parts` (computed if None).
    """
    counts = parts(config) if counts is None else counts
    head = counts["token embedding"] if config.model.tie_embeddings else 0
    return flops_per_token(config, active_params(config, counts) + head)


def idle_experts(config: Config, counts: dict[str, int]) -> int:
    """Of the routed experts' parameters, those that a token does not use. counts: from `parts`."""
    ffn, params = config.model.ffn, counts.get("routed experts", 0)
    return params - params * ffn.top_k // max(1, ffn.routed_experts)


def table_geometry(config: Config) -> Mapping[int, LayerAddressing | FgramAddressing]:
    """As `geometry`, for the sizes alone, for which no tokenizer is read."""
    tokens = dataclasses.replace(config.tokenizer, path="", canonical_vocab_size=0)
    return geometry(dataclasses.replace(config, tokenizer=tokens))[0]


def table_params(config: Config) -> int:
    """Numbers in all tables, with their padding."""
    rows = sum(layer.padded_rows for layer in table_geometry(config).values())
    return rows * config.model.engram.dim


def _idle_values(config: Config, counts: dict[str, int]) -> int:
    """Of the product-key values' parameters, those that a token does not use."""
    memory = config.model.product_keys
    return counts.get(VALUES, 0) - len(memory.layers) * memory.heads * memory.top_k * memory.dim


def geometry(
    config: Config,
) -> tuple[Mapping[int, LayerAddressing | FgramAddressing], int | None]:
    """Every layer's addressing, and the number of canonical ids.

    That number is None while the tokenizer is not trained; the multipliers, which depend on it, are
    then placeholders.
    """
    engram, tokens = config.model.engram, config.tokenizer
    if not engram.layers:
        return {}, None
    if tokens.path or tokens.canonical_vocab_size or engram.hashes_raw_ids:
        tokenizer = load_tokenizer(tokens.path) if tokens.path else None
        addressing = artifact.build_addressing(config, tokenizer)
        return addressing.layers, addressing.canonical_vocab_size
    return plan_layer(engram, tokens.vocab_size), None


def describe(config: Config) -> dict[str, Any]:
    """One JSON-able object: parameter counts, rho, FLOPs and the geometry of every table.

    active_params: weights a token is multiplied with, without the token embedding (Table 1).
    rho: routed experts' share of the sparse parameters (those a token does not use: of experts,
      tables, product-key values), None if there are none (section 3 of the paper).
    rows: that have an address; stored_rows: with the table's padding (dialect "qwen"), which the
      counts of parameters include.
    multipliers: None while the tokenizer, and so the number of canonical ids, is not known; none
      where nothing is hashed (form "scone", whose rows include a spare one).
    product_keys: only if there are some: rows by address, stored_rows of values, rows_read per
      token, of each layer.
    """
    counts = parts(config)
    active, flops = active_params(config, counts), training_flops(config, counts)
    engram = config.model.engram
    layers, canonical = geometry(config)
    idle, tables = idle_experts(config, counts), table_params(config)
    if tables:
        counts["engram tables"] = tables
    total = sum(counts.values())
    embedding = counts["token embedding"]
    values = config.model.product_keys
    learned = {"product_keys": _product_keys(values)} if values.layers else {}
    sparse = idle + tables + _idle_values(config, counts)
    return {
        "name": config.name,
        "total_params": total,
        "active_params": active,
        "engram_params": tables,
        "token_embedding_params": embedding,
        "rho": idle / sparse if sparse else None,
        "flops_per_token": flops,
        "parts": counts,
        "canonical_vocab_size": canonical,
        "engram": {
            str(layer_id): {
                "rows": layer.rows,
                "stored_rows": layer.padded_rows,
                "head_sizes": list(layer.head_sizes),
                "multipliers": list(layer.multipliers) if canonical else None,
                "dim": engram.dim,
                "orders": list(engram.orders),
                "heads_per_order": engram.heads_per_order,
            }
            for layer_id, layer in layers.items()
        },
        **learned,
    }


def _product_keys(memory: ProductKeyConfig) -> dict[str, Any]:
    return {
        "layers": list(memory.layers),
        "rows": memory.sub_keys**2,
        "stored_rows": memory.rows,
        "dim": memory.dim,
        "rows_read": memory.heads * memory.top_k,
    }


def table(description: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    total = description["total_params"]
    lines = [f"{description['name']}", "", f"{'part':34}{'parameters':>18}{'share':>9}"]
    for part, count in sorted(description["parts"].items(), key=lambda item: -item[1]):
        lines.append(f"{part:34}{count:>18,}{count / total:>9.2%}")
    lines.append(f"{'total':34}{total:>18,}")
    lines.append("")
    lines.append(f"active per token (no token embedding) {description['active_params']:,}")
    lines.append(f"training FLOPs per token              {description['flops_per_token']:.4g}")
    rho = description["rho"]
    lines.append(f"rho (experts' share of sparse params) {'-' if rho is None else f'{rho:.1%}'}")
    for layer, memory in description["engram"].items():
        sizes, multipliers = memory["head_sizes"], memory["multipliers"]
        if multipliers == []:
            lines.append(
                f"engram layer {layer}: the {memory['rows'] - 1:,} most frequent n-grams of orders"
                f" {', '.join(map(str, memory['orders']))} x {memory['dim']}, and a spare row"
            )
            continue
        padded = memory["stored_rows"] > memory["rows"]
        stored = f" ({memory['stored_rows']:,} rows stored)" if padded else ""
        numbers = ", ".join(map(str, multipliers or ["known once the tokenizer is trained"]))
        lines.append(
            f"engram layer {layer}: {memory['rows']:,} rows x {memory['dim']}{stored}; "
            f"{len(sizes)} heads of {min(sizes):,} to {max(sizes):,} rows; "
            f"multipliers {numbers}"
        )
    if memory := description.get("product_keys"):
        virtual = f" as {memory['rows']:,}" if memory["rows"] > memory["stored_rows"] else ""
        lines.append(
            f"product keys at layers {', '.join(map(str, memory['layers']))}:"
            f" {memory['stored_rows']:,} values x {memory['dim']}{virtual};"
            f" a token reads {memory['rows_read']}"
        )
    return "\n".join(lines)
