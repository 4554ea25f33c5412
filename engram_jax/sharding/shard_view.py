"""The collectives of code that runs on one device of the mesh, inside shard_map.

The differentiated part of a training step is one shard_map over several devices: every device has
its own sequences, or its own parts of them, and its shards of the weights. `ShardView.all_gather`
makes whole weights from the shards where they are needed; its transpose reduce-scatters the
gradients. On a mesh of one device, and outside of shard_map (`UNSHARDED`), everything here is the
identity.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from engram_jax.sharding import rules, sequence
from engram_jax.sharding.parameters import find
from engram_jax.sharding.rules import ONE_DEVICE, Axes

GATHERED = "gathered weights"  # what rematerialisation need not keep


@dataclass(frozen=True)
class ShardView:
    """The mesh seen from one device; static.

    dtype: what matrices are gathered in, being used in it; None = their own.
    experts: E, all routed experts of a layer.
    platform: of the devices, or of their descriptions (--mode=compile): "cpu", "gpu" or "tpu".
    """

    axes: Axes = ONE_DEVICE
    dtype: DTypeLike | None = None
    experts: int = 0
    platform: str = "cpu"

    @property
    def whole_experts(self) -> bool:
        return self.experts % self.axes.expert == 0

    @property
    def local_experts(self) -> int:
        """Experts a device computes; the last devices' may include some that do not exist."""
        return -(-self.experts // self.axes.expert)

    def all_gather(self, params: Any, *, layer: bool = False) -> Any:
        """Weights from their shards: whole, except that heads and inner widths stay sharded by
        `tensor`, and a device gets only its own experts, [local_experts, in, out].

        layer: the tree is one layer of a stack.
        """
        if self.axes.devices == 1:
            return params
        return jax.tree_util.tree_map_with_path(functools.partial(self._leaf, layer), params)

    def _leaf(self, layer: bool, path: Any, x: jax.Array) -> jax.Array:
        names, ndim = rules.names(path), x.ndim + layer
        found = rules.logical(names[-1], ndim, whole_experts=self.whole_experts)[layer:]
        gathers = tuple(
            (dim, tuple(a for a in rules.RULES[axis] if getattr(self.axes, a) > 1))
            for dim, axis in enumerate(found)
            if axis in ("embed", "latent", "expert_embed", "value_rows")
        )
        gathers = tuple(g for g in gathers if g[1])
        inner = found.index("expert_shard") if "expert_shard" in found else None
        if not gathers and inner is None:
            return x
        keep = self.dtype is None or find(names, ndim).float32
        dtype = x.dtype if keep else jnp.dtype(self.dtype)
        padding = self.local_experts * self.axes.expert - self.experts
        return checkpoint_name(_gathered(x, dtype.name, gathers, inner, padding), GATHERED)

    def psum_tokens(self, x: Any) -> Any:
        """The sum over all devices with different tokens."""
        return lax.psum(x, rules.TOKENS) if self.axes.batch * self.axes.sequence > 1 else x

    def psum_tensor(self, x: jax.Array) -> jax.Array:
        """The sum of the partial results of a tensor group's devices for the same tokens."""
        return lax.psum(x, "tensor") if self.axes.tensor > 1 else x

    def own_tokens(self, tree: Any) -> Any:
        """This device's tokens of arrays [B, T, ...] that have those of whole sequences."""
        shards = self.axes.sequence
        return jax.tree.map(lambda x: sequence.own(x, shards), tree) if shards > 1 else tree

    def whole_sequences(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """All tokens of the sequences of whose tokens, along `axis`, this device has its own."""
        return sequence.whole(x, self.axes.sequence, axis) if self.axes.sequence > 1 else x

    @property
    def sequence_index(self) -> jax.Array | int:
        """Which device of the sequence axis this is."""
        return lax.axis_index(sequence.AXIS) if self.axes.sequence > 1 else 0

    def chunk_starts(self, chunk: int) -> tuple[jax.Array, jax.Array]:
        """Where in a cut sequence this device's chunks of so many tokens begin, int32 [] each."""
        return sequence.chunk_starts(chunk, self.axes.sequence)

    def tokens_before(self, x: jax.Array, count: int) -> jax.Array:
        """The `count` tokens before each chunk of cut sequences: [B, T / S, ...] ->
        [B, 2, count, ...]."""
        return sequence.before(x, count, self.axes.sequence)

    def gather_keys(self, x: jax.Array) -> jax.Array:
        """As `whole_sequences`, of floats [B, T / S, ...], whose gradients are summed over the
        devices in at least float32."""
        shards = self.axes.sequence
        if shards == 1:
            return x
        gathered = _gathered(x, x.dtype.name, ((1, (sequence.AXIS,)),), None, 0)
        return sequence.natural_order(gathered, shards)


UNSHARDED = ShardView()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(
    x: jax.Array, dtype: str, gathers: tuple, inner: int | None, padding: int
) -> jax.Array:
    """A weight from its shards, in `dtype`.

    gathers: (dimension, mesh axes that shard it). inner: the dimension of x [E, ...] that the
    expert axis shards; exchanged (all-to-all) for (E + padding) / axis whole experts.
    """
    x = x.astype(dtype)
    if inner is not None:
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        x = lax.all_to_all(x, "expert", split_axis=0, concat_axis=inner, tiled=True)
    for dim, axes in gathers:
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _forward(x: jax.Array, *static: Any) -> tuple[jax.Array, jax.Array]:
    return _gathered(x, *static), jnp.zeros((0,), x.dtype)


def _backward(
    dtype: str, gathers: tuple, inner: int | None, padding: int, like: jax.Array, g: jax.Array
) -> tuple[jax.Array]:
    """Sums over devices are taken in at least float32: there may be hundreds of terms."""
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    for dim, axes in reversed(gathers):
        g = lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
    if inner is not None:
        g = lax.all_to_all(g, "expert", split_axis=inner, concat_axis=0, tiled=True)
        g = g[: g.shape[0] - padding]
    return (g.astype(like.dtype),)


_gathered.defvjp(_forward, _backward)
