"""The hash in NumPy int64: the reference implementation, written for reading.

With x_{t-k} the canonical id k positions back, layer by layer (paper, section 2.2):

    h_n(t)  = XOR over k < n of  x_{t-k} * m_k            (int64, wrapping)
    address = offset_{n,j} + h_n(t) mod p_{n,j}           (head j of order n)

Before a document's start the fill id is read, never the previous document. A document starts where
`segments` changes (packed sequences), at the array's start (unless `history` is given) and, where
the layer has a `restart_id`, after that id: tokens after it read nothing before it.

Masked ids. A negative id (an image position, a masked token) passes through compression unchanged
and is hashed as a number like any other, as in the public demo; the modulus is non-negative, so
every address is in range. A masked token gets no memory, though: the caller sets its gate to 0
(`canonical < 0`). Its neighbours keep theirs: their n-grams contain the negative id.

`hash_jax`, `hash_tokens` and `hash_batches` compute the same addresses, bit for bit.

Signs (config.model.engram.signs) make a table a count sketch (Charikar, Chen, Farach-Colton 2002):
n-grams that share a row read it with signs of their own, so that what one writes is, on average,
no bias for another. The sign of head j of an order is bit j of a word that the finaliser of
MurmurHash3 mixes from all 64 bits of h_n. (h_n itself has few random bits where they are easy to
take: its lowest is the parity of the ids.) An address, h_n mod a prime, tells nothing about it.
"""

from __future__ import annotations

import numpy as np

from engram_jax.addressing.fgrams import FgramAddressing, find
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.config.errors import UserError

_WORD = 0xFFFFFFFF


def canonicalise(raw: np.ndarray, compression: np.ndarray | None) -> np.ndarray:
    """Raw ids [...] -> canonical ids int32 [...]; negative ids unchanged.

    compression: int32 [V] (None = raw ids are canonical, as in dialect "qwen").
    Raises UserError for an id that the tokenizer does not have.
    """
    raw = np.asarray(raw)
    if compression is None:
        return raw.astype(np.int32)
    highest = raw.max(initial=-1)
    if highest >= len(compression):
        raise UserError(
            f"token id {highest}: must be an id of the tokenizer, 0 to {len(compression) - 1}"
            " (were the tokens made with another one?)"
        )
    return np.where(raw < 0, raw, compression[np.maximum(raw, 0)]).astype(np.int32)


def empty_history(
    layer: LayerAddressing | FgramAddressing, shape: tuple[int, ...] = ()
) -> np.ndarray:
    """The history at a document's start: int32 [*shape, N - 1]."""
    return np.full((*shape, layer.max_ngram - 1), layer.fill_id, np.int32)


def lookback(
    canonical: np.ndarray,
    layer: LayerAddressing | FgramAddressing,
    segments: np.ndarray | None = None,
    history: np.ndarray | None = None,
) -> list[np.ndarray]:
    """[x_t, x_{t-1}, .., x_{t-N+1}] as the hash reads them, each int64 [..., T].

    canonical: ids [..., T].
    segments: document number of every position [..., T]; None = one document.
    history: ids before the first position, oldest first [..., N - 1]; None = the document starts
      at the first position. With `segments`, they belong to the document of that position.

    Raises ValueError for a history of another shape.
    """
    canonical = np.asarray(canonical, np.int64)
    length, past = canonical.shape[-1], layer.max_ngram - 1
    if history is None:
        history = empty_history(layer, canonical.shape[:-1])
    history = np.asarray(history, np.int64)
    if history.shape != (*canonical.shape[:-1], past):
        raise ValueError(f"history has shape {history.shape}: must be [..., {past}]")
    ids = np.concatenate([history, canonical], axis=-1)
    segments = np.zeros(canonical.shape, np.int32) if segments is None else np.asarray(segments)
    before = [segments[..., :1]] * past
    documents = np.concatenate([*before, segments], axis=-1)

    found = [canonical]
    inside = np.ones(canonical.shape, bool)
    for k in range(1, layer.max_ngram):
        back = slice(past - k, past - k + length)
        inside = inside & (documents[..., back] == segments)
        if layer.restart_id is not None:
            inside = inside & (ids[..., back] != layer.restart_id)
        found.append(np.where(inside, ids[..., back], layer.fill_id))
    return found


def mixes(ids: list[np.ndarray], layer: LayerAddressing) -> list[np.ndarray]:
    """h_n for every order n, each int64 [..., T], from `lookback`'s ids."""
    total = np.zeros_like(ids[0])
    found = []
    for k, multiplier in enumerate(layer.multipliers):
        total = total ^ (ids[k] * np.int64(multiplier))
        if k + 1 in layer.orders:
            found.append(total)
    return found


def addresses(
    canonical: np.ndarray,
    layer: LayerAddressing | FgramAddressing,
    segments: np.ndarray | None = None,
    history: np.ndarray | None = None,
) -> np.ndarray:
    """Flat rows of the layer's table: int64 [..., T, H]. Arguments as in `lookback`."""
    ids = lookback(canonical, layer, segments, history)
    if isinstance(layer, FgramAddressing):
        return find(ids, layer).astype(np.int64)
    hashed = mixes(ids, layer)
    per_head = [h for h in hashed for _ in range(layer.heads_per_order)]
    heads = zip(per_head, layer.head_sizes, layer.offsets, strict=True)
    return np.stack([h % size + offset for h, size, offset in heads], axis=-1)


def signs(
    canonical: np.ndarray,
    layer: LayerAddressing,
    segments: np.ndarray | None = None,
    history: np.ndarray | None = None,
) -> np.ndarray:
    """The sign with which each row at `addresses` is read: int8 [..., T, H], 1 or -1. Arguments as
    in `lookback`."""
    found = []
    for h in mixes(lookback(canonical, layer, segments, history), layer):
        word = _finalised(h & _WORD ^ _finalised(h >> 32 & _WORD))
        found += [1 - 2 * (word >> head & 1) for head in range(layer.heads_per_order)]
    return np.stack(found, axis=-1).astype(np.int8)


def _finalised(x: np.ndarray) -> np.ndarray:
    """int64 in [0, 2**32) -> the same, every bit depending on all."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD  # a product may wrap: its low word is right
    x = (x ^ x >> 13) * 0xC2B2AE35 & _WORD
    return x ^ x >> 16
