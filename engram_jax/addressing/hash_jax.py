"""The hash on a device, equal to `hash_numpy` bit for bit, in 32-bit integers (TPUs lack int64).

An int64 h is two uint32 words. Products with the multipliers are built from 16-bit halves, and
everything wraps mod 2**64 as NumPy's int64 does. A head's modulus is taken as

    h = high * 2**32 + low = high * w + low (mod p)          w = 2**32 mod p
    r = high * w - floor(high * w' / 2**32) * p              w' = floor(w * 2**32 / p)   (Shoup)
      + low - floor(low * m / 2**32) * p                     m = floor(2**32 / p)        (Barrett)

Either quotient is the true one or one less, so 0 <= r < 4 p, and two conditional subtractions
finish. That needs 4 p <= 2**32, which `LayerAddressing` guarantees. No floating point is involved.
The sign: for h < 0, ~h = -h - 1 >= 0, and h mod p = p - 1 - (~h mod p).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.addressing.fgrams import FgramAddressing, find_on_device
from engram_jax.addressing.hash_plan import LayerAddressing

_HALF = 0xFFFF
_WORD = 0xFFFFFFFF
Words = tuple[jax.Array, jax.Array]  # (high, low), uint32


def canonicalise(raw: jax.Array, compression: jax.Array | None) -> jax.Array:
    """Raw ids [...] -> canonical ids int32 [...]; negative ids unchanged.

    compression: int32 [V] (None = raw ids are canonical). An id beyond the tokenizer's, for which
    `hash_numpy` raises an error, becomes -1: a masked token, without memory.
    """
    raw = raw.astype(jnp.int32)
    if compression is None:
        return raw
    found = jnp.take(compression, jnp.maximum(raw, 0), mode="fill", fill_value=-1)
    return jnp.where(raw < 0, raw, found)


def empty_history(
    layer: LayerAddressing | FgramAddressing, shape: tuple[int, ...] = ()
) -> jax.Array:
    """The history at a document's start: int32 [*shape, N - 1]."""
    return jnp.full((*shape, layer.max_ngram - 1), layer.fill_id, jnp.int32)


def lookback(
    canonical: jax.Array,
    layer: LayerAddressing | FgramAddressing,
    segments: jax.Array | None = None,
    history: jax.Array | None = None,
) -> list[jax.Array]:
    """[x_t, x_{t-1}, .., x_{t-N+1}], each int32 [..., T]; arguments as in `hash_numpy.lookback`."""
    canonical = canonical.astype(jnp.int32)
    length, past = canonical.shape[-1], layer.max_ngram - 1
    if history is None:
        history = empty_history(layer, canonical.shape[:-1])
    if history.shape != (*canonical.shape[:-1], past):
        raise ValueError(f"history has shape {history.shape}: must be [..., {past}]")
    ids = jnp.concatenate([history.astype(jnp.int32), canonical], axis=-1)
    documents = None
    if segments is not None:
        before = [segments[..., :1]] * past
        documents = jnp.concatenate([*before, segments], axis=-1)

    found = [canonical]
    inside = jnp.ones(canonical.shape, bool)
    for k in range(1, layer.max_ngram):
        back = slice(past - k, past - k + length)
        if documents is not None:
            inside &= documents[..., back] == segments
        if layer.restart_id is not None:
            inside &= ids[..., back] != layer.restart_id
        found.append(jnp.where(inside, ids[..., back], layer.fill_id))
    return found


def addresses(
    canonical: jax.Array,
    layer: LayerAddressing | FgramAddressing,
    segments: jax.Array | None = None,
    history: jax.Array | None = None,
) -> jax.Array:
    """Flat rows of the layer's table: int32 [..., T, H].

    canonical: integer ids [..., T]; segments [..., T]; history [..., N - 1], oldest first; see
    `hash_numpy.lookback`. `layer` is static: its constants are compiled in.
    """
    ids = lookback(canonical, layer, segments, history)
    if isinstance(layer, FgramAddressing):
        return find_on_device(ids, layer)
    high, low = mixes(ids, layer)
    negative = high >> 31 != 0
    high, low = jnp.where(negative, ~high, high), jnp.where(negative, ~low, low)
    # One mix serves all heads of its order: without the barrier a compiler may fuse it into each.
    high, low, negative = jax.lax.optimization_barrier((high, low, negative))
    grid = (len(layer.orders), layer.heads_per_order)
    sizes = np.reshape(layer.head_sizes, grid)
    rest = _modulo(high[..., None], low[..., None], sizes)
    last = jnp.asarray(sizes - 1, jnp.uint32)
    rest = jnp.where(negative[..., None], last - rest, rest).astype(jnp.int32)
    flat = rest + jnp.asarray(np.reshape(layer.offsets, grid), jnp.int32)
    return flat.reshape(*canonical.shape, layer.heads)


def signs(
    canonical: jax.Array,
    layer: LayerAddressing,
    segments: jax.Array | None = None,
    history: jax.Array | None = None,
) -> jax.Array:
    """The signs with which the rows at `addresses` are read: int8 [..., T, H], 1 or -1, those of
    `hash_numpy.signs`. Arguments as in `addresses`."""
    high, low = mixes(lookback(canonical, layer, segments, history), layer)
    word = _finalised(low ^ _finalised(high))
    bits = word[..., None] >> jnp.arange(layer.heads_per_order, dtype=jnp.uint32) & 1
    return (1 - 2 * bits.astype(jnp.int8)).reshape(*canonical.shape, layer.heads)


def _finalised(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, every bit depending on all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def mixes(ids: list[jax.Array], layer: LayerAddressing) -> Words:
    """h_n for every order: two words, uint32 [..., T, orders], from `lookback`'s ids."""
    high = low = jnp.zeros(ids[0].shape, jnp.uint32)
    found = []
    for k, multiplier in enumerate(layer.multipliers):
        product = _times(ids[k].astype(jnp.uint32), multiplier)
        high, low = high ^ product[0], low ^ product[1]
        if k + 1 in layer.orders:
            found.append((high, low))
    return jnp.stack([h for h, _ in found], axis=-1), jnp.stack([l for _, l in found], axis=-1)


def _times(x: jax.Array, multiplier: int) -> Words:
    """The int64 product of an int32 (its bits in x) and a constant, mod 2**64."""
    low_factor, high_factor = multiplier & _WORD, multiplier >> 32
    high, low = _multiply(x, jnp.uint32(low_factor))
    high += x * jnp.uint32(high_factor)
    # A negative id -y has the bits of 2**32 - y: subtract the surplus 2**32 * multiplier.
    return high - jnp.where(x >> 31 != 0, jnp.uint32(low_factor), jnp.uint32(0)), low


def _multiply(x: jax.Array, y: jax.Array) -> Words:
    """The 64-bit product of two uint32, from 16-bit halves. No intermediate sum overflows."""
    x0, x1, y0, y1 = x & _HALF, x >> 16, y & _HALF, y >> 16
    low, cross, middle = x0 * y0, x0 * y1, x1 * y0
    carry = (low >> 16) + (cross & _HALF) + middle
    return x1 * y1 + (cross >> 16) + (carry >> 16), (carry << 16) | (low & _HALF)


def _modulo(high: jax.Array, low: jax.Array, sizes: np.ndarray) -> jax.Array:
    """(high * 2**32 + low) mod sizes for sizes in [1, 2**30], constants; uint32, broadcast."""
    weight = 2**32 % sizes
    p, w = jnp.asarray(sizes, jnp.uint32), jnp.asarray(weight, jnp.uint32)
    w_quotient = jnp.asarray((weight << 32) // sizes, jnp.uint32)
    # For a size of 1, 2**32 is one more than a word holds. The quotient is one less, as it may be.
    one_quotient = jnp.asarray(np.minimum(2**32 // sizes, _WORD), jnp.uint32)
    quotient = _multiply(high, w_quotient)[0] + _multiply(low, one_quotient)[0]
    rest = high * w + low - quotient * p
    # rest < 4 p. Where a difference would be negative it wraps, and is the larger of the two.
    rest = jnp.minimum(rest, rest - 2 * p)
    return jnp.minimum(rest, rest - p)
