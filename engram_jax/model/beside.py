"""What a token reads beside its addresses: the signs of its rows, and the class of its case.

Both are switches (config.model.engram.signs, .case). A model that has one refuses to be run without
what it reads, so that no caller can leave it out by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.addressing.artifact import Addressing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beside:
    """signs: Engram layer id -> int8 [B, T, H], 1 or -1 (hash_jax.signs); empty without signs.

    case: int32 [B, T], the tokens' classes (addressing/case_classes.py); None without case.
    """

    signs: Mapping[str, jax.Array]
    case: jax.Array | None = None


def classes(addressing: Addressing, tokens: jax.Array) -> jax.Array:
    """The tokens' classes, int32 like `tokens`. Class 0 for ids that are no token (masked ones,
    which get no memory), and for all where no tokenizer was given (describe, compile)."""
    if addressing.case is None:
        return jnp.zeros_like(tokens)
    found = jnp.take(
        jnp.asarray(addressing.case), jnp.maximum(tokens, 0), mode="fill", fill_value=0
    )
    return jnp.where(tokens < 0, 0, found)


def signed(rows: jax.Array, signs: jax.Array) -> jax.Array:
    """rows [..., H, dim] times signs [..., H], exactly."""
    return jnp.where(signs[..., None] < 0, -rows, rows)
