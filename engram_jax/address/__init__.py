"""Floor 1: text to addresses, without parameters, from the tokenizer and the configuration alone.

    raw ids --compression--> canonical ids --hashing (multipliers, primes from layout)--> flat rows

`artifact` holds all of it with a fingerprint. The hash exists three times, bit for bit the same:
`hashing` (NumPy int64, the authority), `hashing_jnp` (32-bit words, on a device) and `pipeline`
(batches on the host).
"""

from engram_jax.address.artifact import Addressing, as_stored, build, check_same
from engram_jax.address.compression import build_compression
from engram_jax.address.layout import LayerAddressing, plan
from engram_jax.address.pipeline import BatchAddresser
from engram_jax.address.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_size

__all__ = [
    "Addressing",
    "BatchAddresser",
    "LayerAddressing",
    "as_stored",
    "build",
    "build_compression",
    "check_same",
    "load_tokenizer",
    "plan",
    "tokenizer_fingerprint",
    "tokenizer_size",
]
