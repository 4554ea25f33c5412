"""What a sequence carries from token to token in the network: latent caches, convolution tails."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from engram_jax.layers.mla import MLACache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """lengths: int32 [B], tokens so far.

    caches: first layer of a stage -> MLA caches stacked over its layers.
    tails: Engram layer id -> the convolution's last inputs [B, tail, M, d], None without one.
    """

    lengths: jax.Array
    caches: dict[str, MLACache]
    tails: dict[str, jax.Array | None]

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return next(iter(self.caches.values())).latent.shape[-2]
