"""Which sharding and which optimizer each parameter gets, by its name, and its part of the model.

A parameter's last name says what it is ("q_proj"), the names before it where it is ("blocks", "1",
"attention"). A new parameter is added here and nowhere else; one that is missing raises an error
when the program is built. Tables are not parameters (memory/table.py).
"""

from __future__ import annotations

from dataclasses import dataclass

# What trains a parameter (training/optim). Muon takes matrices that map a vector to a vector, also
# stacked ones (scanned layers, experts, the Engram module's M keys and value). AdamW takes the
# rest: the embedding and the head, and what scales or selects rather than maps - norm gains,
# biases, gates (router, mHC coefficients, sub-keys), and the depthwise taps, which are no matrix.
# MEMORY_ADAM is what the tables have, for values that are parameters: Adam without decay at
# `optimizer.memory_lr_multiplier` times the learning rate.
MUON, ADAMW, ADAMW_NO_DECAY, MEMORY_ADAM = "muon", "adamw", "adamw_no_decay", "memory_adam"


@dataclass(frozen=True)
class Parameter:
    """One kind of parameter.

    optimizer: MUON, ADAMW, ADAMW_NO_DECAY (weight decay 0) or MEMORY_ADAM.
    axes: the logical axis of each trailing dimension; `rules.RULES` says which mesh axes shard it.
      Dimensions in front of them (stacked layers) are replicated.
    fan_in: the dimension a matrix of Muon's maps from; it maps to the last one.
    float32: it is used in float32, whatever the network computes in.
    """

    optimizer: str
    axes: tuple[str | None, ...] = ()
    fan_in: int = -2
    float32: bool = False


PARAMETERS: dict[str, Parameter] = {
    "embedding": Parameter(ADAMW, (None, "embed")),
    "head": Parameter(ADAMW, (None, "embed")),
    # MLA
    "q_proj": Parameter(MUON, ("embed", "heads")),
    "kv_a_proj": Parameter(MUON, ("embed", None)),
    "kv_b_proj": Parameter(MUON, ("latent", "heads")),
    "o_proj": Parameter(MUON, ("heads", "embed")),
    # SwiGLU: dense layers and shared experts
    "gate": Parameter(MUON, ("embed", "inner")),
    "up": Parameter(MUON, ("embed", "inner")),
    "down": Parameter(MUON, ("inner", "embed")),
    # MoE
    "router": Parameter(ADAMW, ("embed", None), float32=True),
    # Engram: [d_mem, M + 1, d], M + 1 separate maps d_mem -> d; the short convolution
    "projection": Parameter(MUON, (None, None, "embed"), fan_in=-3),
    "taps": Parameter(ADAMW_NO_DECAY),
    # its variants (docs/models.md): a constant gate per branch, vectors of case, OverEncoding
    "gate_logit": Parameter(ADAMW_NO_DECAY),
    "case": Parameter(ADAMW_NO_DECAY),
    "order_projections": Parameter(MUON, (None, None, "embed")),
    # F-gram embeddings
    "fgram_proj": Parameter(MUON, (None, "embed")),
    # Product keys: [heads, 2, keys, key_dim / 2]; the values [R, dim]; E maps dim -> d
    "query_proj": Parameter(MUON, ("embed", None)),
    "sub_keys": Parameter(ADAMW, float32=True),
    "values": Parameter(MEMORY_ADAM, ("value_rows", None)),
    "value_proj": Parameter(MUON, (None, None, "embed")),
    # mHC
    "fn": Parameter(ADAMW, ("embed", None), float32=True),
    "base": Parameter(ADAMW_NO_DECAY),
    "scale": Parameter(ADAMW_NO_DECAY),
    # norms and biases of any module
    "gain": Parameter(ADAMW_NO_DECAY),
    "norm_gain": Parameter(ADAMW_NO_DECAY),
    "bias": Parameter(ADAMW_NO_DECAY),
}
# SwiGLU of the routed experts, [layers, E, in, out]: one dimension more than the dense layers'.
ROUTED_EXPERTS: dict[str, Parameter] = {
    "gate": Parameter(MUON, ("experts", "expert_embed", "expert_inner")),
    "up": Parameter(MUON, ("experts", "expert_embed", "expert_inner")),
    "down": Parameter(MUON, ("experts", "expert_inner", "expert_embed")),
}
_ROUTED_NDIM = 4

VALUES = "product-key values"

# Part of the model, by the first of these endings that one of a parameter's names has.
PARTS: tuple[tuple[str, str], ...] = (
    ("embedding", "token embedding"),
    ("head", "output head"),
    ("engrams", "engram projections, gates, conv"),
    ("case", "engram case vectors"),
    ("values", VALUES),
    ("product_keys", "product keys, queries, maps"),
    ("_hyper", "hyper-connections"),
    ("attention", "attention (MLA)"),
    ("shared", "shared experts"),
    ("router", "routers"),
    ("ffn", "dense feed-forward"),
    ("", "norms"),
)


def is_routed(name: str, ndim: int) -> bool:
    """Whether a parameter of this name and number of dimensions (stacked layers included) belongs
    to the routed experts."""
    return name in ROUTED_EXPERTS and ndim == _ROUTED_NDIM


def find(path: tuple[str, ...], ndim: int) -> Parameter:
    """The parameter at a path ("blocks", "1", "attention", "q_proj") with `ndim` dimensions. Raises
    ValueError for a name that is not in the table."""
    name = path[-1]
    if is_routed(name, ndim):
        return ROUTED_EXPERTS[name]
    if name not in PARAMETERS:
        raise ValueError(f"parameter {'/'.join(path)} is unknown: add it to {__name__}")
    return PARAMETERS[name]


def part_of(path: tuple[str, ...], ndim: int) -> str:
    """Which part of the model a parameter belongs to."""
    if "ffn" in path and is_routed(path[-1], ndim):
        return "routed experts"
    return next(part for end, part in PARTS if any(name.endswith(end) for name in path))


def group_of(path: tuple[str, ...], ndim: int) -> str:
    """The part of the model in a word, for the names of metrics: "attention", "ffn", "experts",
    "norms", ..."""
    if "ffn" in path and is_routed(path[-1], ndim):
        return "experts"
    end = next(end for end, _ in PARTS if any(name.endswith(end) for name in path))
    return end.strip("_") or "norms"
