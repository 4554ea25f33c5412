"""Looks inside a model: LogitLens, similar layers, what the loss owes to the memory, what rows
answer to. --mode=analyse makes a page of the same (docs/analysis.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.addressing import LayerAddressing, tokenizer_fingerprint
from engram_jax.analysis import depth
from engram_jax.analysis import sensitivity as switching
from engram_jax.analysis.depth import Lens, Similarity, Variables
from engram_jax.analysis.entities import final_tokens_of_batch
from engram_jax.analysis.row_readers import CanonicalText, RowReaders, head_of, order_of
from engram_jax.analysis.sensitivity import Effect
from engram_jax.analysis.table_rows import nearest_rows
from engram_jax.analysis.texts import (
    TextBatches,
    batch_shape,
    batches_of,
    hashed_layers,
    ngrams_of,
    with_batches,
)
from engram_jax.analysis.usage import NgramCounts, OrderUsage
from engram_jax.analysis.usage import usage as usage_of
from engram_jax.api.models import Model
from engram_jax.api.training import Documents
from engram_jax.config.errors import UserError
from engram_jax.data.array_store import array_store
from engram_jax.model.program import Program, check_decodes
from engram_jax.training.state import TrainState


@dataclass(frozen=True)
class RowAnswer:
    """What a row of a table answers to.

    order, head: of the n-grams that read it. readers: (n-gram, how often) of a text, the most
    frequent ones; an n-gram is its canonical ids' words with a dot between each two, or a tuple of
    ids without a tokenizer. different: how many different ones read it. hits: how often all of them
    do. nearest: (row, cosine) of the same head.
    """

    order: int
    head: int
    readers: list[tuple[str | tuple[int, ...], int]]
    different: int
    hits: int
    nearest: list[tuple[int, float]]


def log_lens(model: Model, state: TrainState, documents: Documents) -> Lens:
    """LogitLens: KL(softmax of a layer's logits || the model's) in nats, `mean` and standard
    `error` float64 [layers], over all tokens of documents. The last layer's is 0.

    documents: as for `batches`. What `switch_off` has switched off adds nothing.

    Example: `log_lens(model, state, documents).mean`.
    """
    program, text = _opened([model], documents)
    return depth.log_lens(program[0], _variables(state), text)


def layer_similarity(
    model: Model,
    state: TrainState,
    documents: Documents,
    other: tuple[Model, TrainState] | None = None,
    places: Sequence[Sequence[int] | np.ndarray] | None = None,
) -> Similarity:
    """CKA (linear kernel, unbiased minibatch HSIC) of layers: `cka` float64 [layers of `other`,
    layers of the model], or of the model with itself; `analysis.cka.soft_alignment` of it says
    which layer of `other` each is like.

    documents: as for `batches`. other: another model of the same tokenizer, with its state.
    places: for each document, the tokens to compare at; None = those in which entities end
      (analysis/entities.py has the rule), which needs a tokenizer.

    Raises UserError for fewer than 4 such tokens, and for places that are not in the documents.

    Example: `layer_similarity(model, state, documents, (baseline, its_state)).cka`.
    """
    models = [model] if other is None else [other[0], model]
    of_each = [m.tokenizer and tokenizer_fingerprint(m.tokenizer) for m in models]
    if of_each[0] != of_each[-1] or len({m.config.tokenizer.vocab_size for m in models}) > 1:
        raise UserError("other: has another tokenizer; layers are compared at the same tokens")
    programs, text = _opened(models, documents)
    if places is None:
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise UserError("places: are missing; without a tokenizer no entity is found")
        pairs = ((batch, final_tokens_of_batch(tokenizer, batch)) for batch in text)
    else:
        pairs = text.with_places(_positions(documents, places))  # type: ignore[assignment]
    states = [state] if other is None else [other[1], state]
    variables = [_variables(each) for each in states]
    try:
        return depth.similarity(list(zip(programs, variables, strict=True)), pairs)
    except ValueError as error:
        raise UserError(f"documents: {error}") from error


def sensitivity(
    model: Model, state: TrainState, documents: Documents, trained_on: Documents
) -> list[Effect]:
    """What the loss of documents owes to every layer, order, head and band of frequencies of the
    memory: each is switched off, nothing is trained again. Each `Effect` has the `part`, the `rise`
    of the loss in nats per target and its standard `error`.

    trained_on: documents whose n-grams are counted, for the bands.

    Example: `{effect.part.name: effect.rise for effect in sensitivity(model, state, a, b)}`.
    """
    if model.config.serve.off_layers or model.config.serve.off_orders:
        raise UserError("model: has something switched off; give the one with everything on")
    ngrams = _counted(model, trained_on)
    if not ngrams:
        return []
    (program,), text = _opened([model], documents)
    parts = switching.parts_of(program)
    return switching.sensitivity(program, _variables(state), text, parts, ngrams)


def usage(model: Model, documents: Documents) -> dict[int, dict[int, OrderUsage]]:
    """How documents use the memory's rows: Engram layer id -> order -> `OrderUsage`: different
    n-grams, Zipf's exponent, and for each head the rows that are read, and n-grams that share one.

    It depends on the tokens alone; no state is needed.

    Example: `usage(model, documents)[1][2].heads[0].dead`.
    """
    ngrams = _counted(model, documents)
    return {
        layer.layer_id: {order: usage_of(layer, ngrams[order]) for order in layer.orders}
        for layer in _layers(model)
    }


def row_answers(
    model: Model,
    state: TrainState,
    documents: Documents,
    layer: int,
    rows: Sequence[int] | np.ndarray,
    most: int = 8,
) -> dict[int, RowAnswer]:
    """What rows of an Engram layer's table answer to: `RowAnswer` by row.

    rows: addresses, of `addresses` or `slots`. documents: whose n-grams read them. most: how many
    readers and neighbours of each, at most.

    Raises UserError for a layer or a row that is not there.

    Example: `row_answers(model, state, documents, 1, slots(model, "New York")[1][2])`.
    """
    layers = {each.layer_id: each for each in _layers(model)}
    if layer not in layers:
        known = ", ".join(map(str, layers)) or "none"
        raise UserError(f"layer: {layer} is no Engram layer with slots; there are {known}")
    own, ngrams = layers[layer], _counted(model, documents)
    if wrong := [int(row) for row in rows if not 0 <= row < own.rows]:
        raise UserError(f"rows: {wrong[0]}: must be from 0 to {own.rows - 1}")
    addressing, text = model.program.addressing, None
    if model.tokenizer is not None and addressing is not None:
        text = CanonicalText(addressing, model.tokenizer, own.fill_id)
    found, readers = {}, RowReaders(own, ngrams, {head_of(own, int(row)) for row in rows})
    for row in map(int, rows):
        read = readers.of(row, most)
        near, cosines = nearest_rows(model.program, state.memory, layer, row, most)
        names = [text(w) if text else tuple(map(int, w)) for w in read.windows]
        found[row] = RowAnswer(
            order=order_of(own, row),
            head=head_of(own, row) % own.heads_per_order,
            readers=list(zip(names, read.counts.tolist(), strict=True)),
            different=read.total,
            hits=read.reads,
            nearest=list(zip(near.tolist(), cosines.tolist(), strict=True)),
        )
    return found


def _variables(state: TrainState) -> Variables:
    return state.params, state.router_bias, state.memory


def _opened(models: Sequence[Model], documents: Documents) -> tuple[list[Program], TextBatches]:
    """The models' programs for batches of one form, and the documents in these."""
    for model in models:
        check_decodes(model.config)
    length = min(model.config.data.seq_len for model in models)
    shapes = [batch_shape(m.config, m.program.axes.batch, length) for m in models]
    size, length = min(b for b, _ in shapes), min(t for _, t in shapes)
    programs = [with_batches(model.program, size, length) for model in models]
    store = array_store(documents, models[-1].config.tokenizer.vocab_size)
    if len(store) == store.documents:
        raise UserError("documents: no token to predict; nothing predicts the first of a document")
    return programs, batches_of(store, programs[-1].config)


def _positions(documents: Documents, places: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Places by document -> tokens of all documents, int64 ascending."""
    if len(places) != len(documents):
        raise UserError(f"places: {len(places)} for {len(documents)} documents; must be one each")
    found, start = [np.zeros(0, np.int64)], 0
    for number, (document, at) in enumerate(zip(documents, places, strict=True)):
        own = np.asarray(at, np.int64).reshape(-1)
        if wrong := [int(i) for i in own if not 0 <= i < len(document)]:
            raise UserError(
                f"places[{number}]: {wrong[0]}: must be from 0 to {len(document) - 1}, tokens of"
                " the document"
            )
        found.append(start + own)
        start += len(document)
    return np.unique(np.concatenate(found))


def _layers(model: Model) -> list[LayerAddressing]:
    """The Engram layers whose rows stand for hashes of n-grams."""
    check_decodes(model.config)
    if model.program.addressing is None:
        return []
    return hashed_layers(model.program.addressing)


def _counted(model: Model, documents: Documents) -> dict[int, NgramCounts]:
    """The n-grams of documents as sequences of training's length, by order."""
    layers, config = _layers(model), model.config
    if not layers or model.program.addressing is None:
        return {}
    text = batches_of(array_store(documents, config.tokenizer.vocab_size), config)
    return ngrams_of(model.program.addressing, text.sequences, text.numbers)
