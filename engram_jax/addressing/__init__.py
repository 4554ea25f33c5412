"""Maps token ids to rows of the tables; it depends on the tokenizer and configuration alone.

    raw ids --compression--> canonical ids --hash (primes, multipliers: hash_plan)--> rows

`artifact` stores all of it with a fingerprint. The hash has four implementations, equal bit for
bit: `hash_numpy` (int64, the reference), `hash_jax` (32-bit words, on a device), `hash_batches`
(batches in the data pipeline) and `hash_numba` (a few tokens, for serving: `hash_tokens`).
"""

from engram_jax.addressing.artifact import Addressing, as_stored, build_addressing, check_same
from engram_jax.addressing.compression import build_compression
from engram_jax.addressing.hash_batches import BatchAddresser
from engram_jax.addressing.hash_plan import LayerAddressing, plan_layer
from engram_jax.addressing.tokenizer import (
    drawable_ids,
    load_tokenizer,
    same_tokenizer,
    tokenizer_fingerprint,
    tokenizer_size,
)

__all__ = [
    "Addressing",
    "BatchAddresser",
    "LayerAddressing",
    "as_stored",
    "build_addressing",
    "build_compression",
    "check_same",
    "drawable_ids",
    "load_tokenizer",
    "plan_layer",
    "same_tokenizer",
    "tokenizer_fingerprint",
    "tokenizer_size",
]
