"""Memory lookups: which rows tokens address, and what a layer makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engram_jax.addressing import Addressing, BatchAddresser, LayerAddressing
from engram_jax.addressing.hash_numpy import canonicalise
from engram_jax.analysis.memory_reading import MemoryReading, read_document
from engram_jax.analysis.texts import hashed_layers
from engram_jax.api.models import Model
from engram_jax.config.errors import UserError
from engram_jax.model.program import check_decodes
from engram_jax.training.state import TrainState, weights_of

Text = str | Sequence[int] | np.ndarray


def addresses(model: Model, tokens: Text) -> dict[int, np.ndarray]:
    """The rows that each token of the beginning of a document reads: Engram layer id -> int32
    [T, H], rows of the layer's table (all heads of the first order, then of the next). They depend
    on the tokens alone; no state is needed.

    tokens: ids [T], or a text. Raises UserError for ids that the tokenizer does not have.

    Example: `addresses(model, "Once upon a time")[1]`.
    """
    addressing = model.program.addressing
    check_decodes(model.config)
    if addressing is None:
        return {}
    ids = model.ids(tokens, "tokens")
    return {int(k): found[0] for k, found in BatchAddresser(addressing)(ids[None]).items()}


def canonical_ids(model: Model, tokens: Text) -> np.ndarray:
    """The ids that are hashed: int32 [T]. Ids whose text is equal up to case, accents and white
    space have one in common (the paper, section 2.2); without compression they are the token ids.

    tokens: ids [T], or a text. Raises UserError for ids that the tokenizer does not have, and for a
    model without memory.

    Example: `canonical_ids(model, " The the THE")`.
    """
    addressing = _addressing(model)
    return canonicalise(model.ids(tokens, "tokens"), addressing.compression)


def hash_plan(model: Model) -> dict[int, LayerAddressing]:
    """What decides the addresses of canonical ids (equation 1): Engram layer id -> its multipliers,
    the primes `head_sizes` of its heads and their `offsets` in the layer's table, its n-gram
    orders, and `fill_id`, which stands before a document.

    With x the canonical ids as int64, head j of order n reads row
    offsets[j] + (x[t] * multipliers[0] ^ ... ^ x[t-n+1] * multipliers[n-1]) % head_sizes[j].

    Raises UserError for memories whose rows stand for no hash, and for a model without memory.

    Example: `hash_plan(model)[1].head_sizes`.
    """
    found = hashed_layers(_addressing(model))
    if not found:
        raise _no_hash(model)
    return {layer.layer_id: layer for layer in found}


def _addressing(model: Model) -> Addressing:
    if model.program.addressing is None:
        raise UserError("config.model.engram.layers = (): the model has no memory")
    return model.program.addressing


def _no_hash(model: Model) -> UserError:
    form = model.config.model.engram.form
    return UserError(f"config.model.engram.form = {form!r}: has no slots; addresses() has its rows")


def slots(model: Model, ngram: Text) -> dict[int, dict[int, np.ndarray]]:
    """The rows that stand for the last n tokens of an n-gram: Engram layer id -> order n -> int32
    [heads of an order], for the orders that it is long enough for. Every text in which the n tokens
    stand reads these rows there, and other n-grams may share them.

    ngram: ids or a text, whose last token is the one that reads. Raises UserError for fewer tokens
    than the lowest order, and for memories whose rows stand for no hash.

    Example: `slots(model, "New York")[1][2]`.
    """
    ids, found = model.ids(ngram, "ngram"), {}
    for layer, rows in addresses(model, ids).items():
        own = model.program.addressing.layers[layer]  # type: ignore[union-attr]
        if not isinstance(own, LayerAddressing):
            raise _no_hash(model)
        if len(ids) < own.orders[0]:
            raise UserError(f"ngram: is {len(ids)} token(s), must be {own.orders[0]} at least")
        by_order = rows[-1].reshape(len(own.orders), own.heads_per_order)
        found[layer] = {n: r for n, r in zip(own.orders, by_order, strict=True) if n <= len(ids)}
    return found


def read_memory(model: Model, state: TrainState, tokens: Text) -> dict[int, MemoryReading]:
    """What every Engram layer that is on reads and adds, over the beginning of a document: layer id
    -> `MemoryReading`: addresses int32 [T, H], rows [T, H, dim], gates float32 [T, M] (None in a
    layer without), added [T, M, d], streams [T, M, d], to which it is added.

    tokens: ids [T], or a text. It is compiled for each number of tokens. Raises UserError as
    `addresses`.

    Example: `read_memory(model, state, "def main(")[1].gates.mean(axis=1)`.
    """
    check_decodes(model.config)
    ids = model.ids(tokens, "tokens")
    if model.program.addressing is None:
        return {}
    found = read_document(model.reading, weights_of(model.program, state), ids)
    return {int(layer): reading for layer, reading in found.items()}
