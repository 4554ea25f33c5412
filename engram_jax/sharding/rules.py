"""The sharding rules: the mesh axes, and which of them shards which dimension of an array.

    axis     shards
    data     the batch; every weight is replicated (its gradients are summed over the axis)
    fsdp     the batch and every weight; a layer's weights are all-gathered when the layer runs
    expert   the batch, and the routed experts by whole experts
    sequence the tokens of each sequence (sharding/sequence.py); every weight is replicated
    tensor   attention heads and the inner widths of feed-forward layers; tokens are replicated

The tables are sharded by rows over every device of the mesh, whatever its axes
(memory/exchange.py).

Weights other than experts are not also sharded by `expert`: 2,560 columns in 128 shards are 20
columns each, which do not fill a tile of a TPU, and XLA then gathers them by an all-reduce of
zero-padded copies, twice the bytes (docs/log.md).

A parameter is recognised by its name, so the same rule serves it, its gradient and its moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import DENSE_ADAM, Config, MeshConfig
from engram_jax.config.errors import UserError
from engram_jax.sharding.parameters import PARAMETERS, ROUTED_EXPERTS, is_routed

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH = ("data", "fsdp", "expert")
TOKENS = (*BATCH, "sequence")  # devices along these have different tokens
P = PartitionSpec

# Logical axis -> mesh axes that shard it. What has none is replicated.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "embed": ("fsdp",),
    "latent": ("fsdp",),
    "value_rows": ("fsdp",),
    "heads": ("tensor",),
    "inner": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp",),
    # Where the number of experts is no multiple of the expert axis (the paper's 55), each expert is
    # sharded by its inner width and exchanged for whole ones when its layer runs (shard_view.py).
    "expert_inner": ("tensor",),
    "expert_shard": ("expert", "tensor"),
}


@dataclass(frozen=True)
class Axes:
    """Devices along each mesh axis."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.batch * self.sequence * self.tensor

    @property
    def batch(self) -> int:
        """Shards of the batch."""
        return self.data * self.fsdp * self.expert

    def size(self, names: Sequence[str]) -> int:
        return math.prod(getattr(self, name) for name in names)

    def __str__(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in AXES)


ONE_DEVICE = Axes()


def axes_for(config: MeshConfig, devices: int) -> Axes:
    """The mesh's axes on `devices` devices. Raises UserError if their product is another number."""
    fixed = config.data * config.expert * config.sequence * config.tensor
    fsdp = config.fsdp or devices // fixed
    axes = Axes(config.data, fsdp, config.expert, config.sequence, config.tensor)
    if not fsdp or axes.devices != devices:
        product = f"data {config.data} x fsdp {config.fsdp or '(the rest)'}"
        product += f" x expert {config.expert} x sequence {config.sequence}"
        product += f" x tensor {config.tensor}"
        raise UserError(f"config.mesh: {product} must make {devices}, the number of devices")
    return axes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), arranged by their interconnect. Raises UserError if
    the axes do not fit their number, or `data` is not a multiple of the number of slices."""
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else devices
    axes = axes_for(config, len(devices))
    shape = tuple(getattr(axes, name) for name in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if axes.data % slices:
        raise UserError(
            f"config.mesh.data = {axes.data}: must be a multiple of {slices}, the number of slices"
            " (of the axes only data is to cross the network between them)"
        )
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    elif slices > 1:
        inside = (axes.data // slices, *shape[1:])
        across = (slices, *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            shape, devices, contiguous_submeshes=False, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES)


def axes_of(mesh: Mesh) -> Axes:
    return Axes(**{name: mesh.shape[name] for name in AXES})


def on_tpu(mesh: Mesh) -> bool:
    """Whether its devices are TPUs, or descriptions of them."""
    return mesh.devices.flat[0].platform == "tpu"


def row_major(mesh: Mesh, spec: PartitionSpec, ndim: int) -> Any:
    """A sharding for `jit` and `device_put` that keeps an array's last dimension contiguous.

    By default XLA stores a [rows, 80] array column-major on a TPU, and copies all of it for every
    gather and scatter of rows.
    """
    sharding = NamedSharding(mesh, spec)
    return Format(Layout(tuple(range(ndim))), sharding) if on_tpu(mesh) else sharding


def check(config: Config, axes: Axes) -> None:
    """Raises UserError, with the numbers, where an axis does not divide what it shards."""
    model, data = config.model, config.data
    attention, ffn = model.attention, model.ffn
    weights, rows = axes.size(RULES["embed"]), axes.batch * config.train.accumulation
    demands = [
        ("data.batch_size", data.batch_size, rows, "data x fsdp x expert x train.accumulation"),
        ("model.d_model", model.d_model, weights, "fsdp"),
        ("model.attention.kv_lora_rank", attention.kv_lora_rank, weights, "fsdp"),
        ("model.attention.heads", attention.heads, axes.tensor, "tensor"),
    ]
    if not ffn.routed_experts or ffn.dense_layers:
        demands.append(("model.ffn.dense_dim", ffn.dense_dim, axes.tensor, "tensor"))
    if ffn.routed_experts:
        shards = axes.tensor * (1 if ffn.routed_experts % axes.expert == 0 else axes.expert)
        name = "tensor" if shards == axes.tensor else "expert x tensor (the experts do not divide)"
        demands.append(("model.ffn.expert_dim", ffn.expert_dim, shards, name))
    if model.product_keys.layers:
        rows = model.product_keys.rows
        demands.append(("model.product_keys: sub_keys^2 / expansion", rows, weights, "fsdp"))
    check_length("config.data.seq_len", data.seq_len, config, axes)
    for key, value, divisor, what in demands:
        if value % divisor:
            raise UserError(
                f"config.{key} = {value}: must be a multiple of {divisor} = {what} of the mesh"
                f" {axes}"
            )
    if config.optimizer.memory_optimizer == DENSE_ADAM and axes.devices > 1:
        raise UserError(
            f"config.optimizer.memory_optimizer = {DENSE_ADAM!r}: is for comparison on one device;"
            f" this mesh has {axes.devices}"
        )


def check_length(what: str, length: int, config: Config, axes: Axes) -> None:
    """Raises UserError, naming `what`, for sequences whose tokens the mesh cannot be given."""
    shards, divisor, why = axes.sequence, axes.tensor, "tensor"
    if shards > 1:
        divisor, why = 2 * shards * axes.tensor, "2 x sequence x tensor"
    if length % divisor:
        raise UserError(
            f"{what} = {length}: must be a multiple of {divisor} = {why} of the mesh {axes}"
        )
    engram = config.model.engram
    reach = max(engram.conv_kernel - 1, 0) * engram.max_ngram if engram.layers else 0
    if shards > 1 and length // (2 * shards) < reach:
        raise UserError(
            f"{what} = {length}: must be at least {2 * shards * reach} on the mesh {axes}: of each"
            f" of its 2 x sequence parts, the short convolution reads the last {reach} tokens in"
            " the next one"
        )


def names(path: Any) -> tuple[str, ...]:
    """A jax key path as strings: ("blocks", "1", "attention", "q_proj")."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def logical(name: str, ndim: int, *, whole_experts: bool) -> tuple[str | None, ...]:
    """Logical axes of all dimensions of a parameter, its gradient or a moment of it.

    whole_experts: the number of experts is a multiple of the expert axis.
    """
    if is_routed(name, ndim):
        found = ROUTED_EXPERTS[name].axes
        if not whole_experts:
            sharded = {"experts": None, "expert_inner": "expert_shard"}
            found = tuple(sharded.get(str(axis), axis) for axis in found)
    else:  # anything but a parameter (an optimizer's count) is replicated
        found = PARAMETERS[name].axes if name in PARAMETERS else ()
    return (*(None,) * (ndim - len(found)), *found)[:ndim]


def spec(path: Any, leaf: Any, axes: Axes) -> PartitionSpec:
    """How a leaf of the parameters, or of their optimizer's state, is sharded."""
    name, ndim = names(path)[-1], len(leaf.shape)
    whole = not is_routed(name, ndim) or leaf.shape[1] % axes.expert == 0
    found = logical(name, ndim, whole_experts=whole)
    axes_of_each = [RULES[axis] for axis in found]
    return P(*(names or None for names in axes_of_each)) if any(axes_of_each) else P()


def specs(tree: Any, axes: Axes) -> Any:
    """`spec` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec(path, leaf, axes), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs(tree, axes_of(mesh)), is_leaf=_is_spec
    )


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
