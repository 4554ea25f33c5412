"""The analyses of --mode=analyse, each a function from what was opened to a record of JSON values.

The estimators are in engram_jax/analysis/; here are the texts that they read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from engram_jax.addressing import LayerAddressing
from engram_jax.analysis import depth
from engram_jax.analysis.cka import SMALLEST, soft_alignment
from engram_jax.analysis.entities import final_tokens_of_batch, labelled_tokens
from engram_jax.analysis.gates import gates_of_text
from engram_jax.analysis.sensitivity import Effect, losses_by_frequency, parts_of
from engram_jax.analysis.sensitivity import sensitivity as effects_of
from engram_jax.analysis.texts import batches_of, spread
from engram_jax.analysis.usage import (
    BANDS,
    NgramCounts,
    OrderUsage,
    band_name,
    band_of,
    rank_curve,
)
from engram_jax.analysis.usage import usage as usage_of
from engram_jax.checkpoint.workdir import TASK_ITEMS
from engram_jax.run.analysis_inputs import Given, NothingToAnalyseError
from engram_jax.run.analysis_texts import (
    TEXT_TOKENS,
    addressed,
    counted,
    given_document,
    held_out_text,
    norms_of_rows,
    row_hits,
    subjects,
    text_of_given,
)
from engram_jax.run.task_sensitivity import task_effects

Record = dict[str, Any]
SENSITIVITY_TOKENS = 16_384  # of held-out text, which is read once for each part


def lens(given: Given) -> Record:
    """LogitLens of the models."""
    text, of = text_of_given(given)
    found = []
    for subject in subjects(given):
        one = depth.log_lens(subject.program, subject.variables, text)
        config = subject.program.config
        found.append(
            {
                "name": config.name,
                "run": subject.loaded.run,
                "engram_layers": list(config.model.engram.layers),
                "kl": one.mean.tolist(),
                "standard_error": one.error.tolist(),
            }
        )
    return {"of": of, "tokens": text.tokens, "models": found}


def cka(given: Given) -> Record:
    """CKA of the layers of the run (second) with those of the one beside it (first), or of itself,
    and which layers of the first the second's are like."""
    first, second = given.other or given.model, given.model
    tokenizer, path = second.loaded.tokenizer, given.settings.entities
    config = second.program.config
    if path is None:
        text, of = text_of_given(given)
        entities = "runs of capitalised words that do not begin a sentence"
        pairs: Iterable[Any] = ((batch, final_tokens_of_batch(tokenizer, batch)) for batch in text)
    else:
        eos, vocab = second.loaded.eos_id, config.tokenizer.vocab_size
        store, positions = labelled_tokens(tokenizer, eos, vocab, path)
        numbers = np.unique(positions // config.data.seq_len)
        most = max(1, (given.settings.text_tokens or TEXT_TOKENS) // config.data.seq_len)
        text = batches_of(store, config, numbers=numbers[spread(len(numbers), most)])
        of, entities = str(path), "labelled there"
        pairs = text.with_places(positions)
    models = [(s.program, s.variables) for s in (first, second)[: 2 if given.other else 1]]
    try:
        found = depth.similarity(models, pairs)
    except ValueError as error:
        raise NothingToAnalyseError(
            f"--what=cka: {of} has fewer than {SMALLEST} entities ({entities}) in {text.tokens:,}"
            " tokens; give more text (--text_tokens), or label some (--entities)"
        ) from error
    alignment = soft_alignment(found.cka).tolist() if given.other else None
    return {
        "of": of,
        "tokens": text.tokens,
        "entities": entities,
        "entity_tokens": found.tokens,
        "minibatches": found.batches,
        "first": first.loaded.run,
        "second": second.loaded.run,
        "cka": found.cka.tolist(),
        "soft_alignment": alignment,
    }


def sensitivity(given: Given) -> Record:
    """What the loss, and the synthetic tasks where the run has them, owe to parts of the memory."""
    subject, ngrams = given.model, counted(given)
    text, of = held_out_text(given, SENSITIVITY_TOKENS)
    parts = parts_of(subject.program)
    effects = effects_of(subject.program, subject.variables, text, parts, ngrams)
    record = {
        "of": of,
        "tokens": text.tokens,
        "targets": effects[0].targets,
        "loss": effects[0].base / effects[0].targets,
        "counted": given.cache["counted"],
        "parts": [_effect(effect) for effect in effects],
    }
    if (given.workdir / TASK_ITEMS).exists():
        record["tasks"] = task_effects(given, parts, ngrams)
    return record


def _effect(effect: Effect) -> Record:
    return {
        "part": effect.part.name,
        "rise": effect.rise,
        "standard_error": effect.error,
        "affected": effect.affected,
        "rise_where_affected": effect.rise_where_affected,
    }


def gates(given: Given) -> Record:
    """The gates at the beginning of the text, or of a held-out document."""
    subject = given.model
    length = subject.program.config.data.seq_len
    if given.settings.text is not None:
        store, of = given_document(given), str(given.settings.text)
        document = store.tokens[:-1]  # without its end
    else:
        assert given.data is not None
        held_out = given.data.prepared.store_valid
        lengths = np.diff(held_out.starts) - 1  # without the end of the document
        number = int(np.argmax(np.minimum(lengths, length)))  # the first of the longest
        start, of = int(held_out.starts[number]), f"held-out document {number}"
        document = held_out.tokens[start : start + int(lengths[number])]
    ids = document[:length].tolist()
    found = gates_of_text(subject.program, subject.variables, subject.loaded.tokenizer, ids)
    return {
        "of": of,
        "shown": len(ids),
        "whole": len(document),
        "layers": list(found.layers),
        "tokens": found.tokens,
        "gates": np.round(found.gates.astype(np.float64), 4).tolist(),
    }


def usage(given: Given) -> Record:
    """How the training text uses the rows, their norms by how often they are read, and the
    held-out losses by how often the n-gram was read in training."""
    subject, ngrams = given.model, counted(given)
    variables = subject.variables
    layers = {}
    for layer in addressed(given):
        read = row_hits(given, layer)
        norms = norms_of_rows(given, layer)
        layers[str(layer.layer_id)] = {
            str(order): _order(layer, usage_of(layer, ngrams[order]), ngrams[order], read, norms)
            for order in layer.orders
        }
    text, of = held_out_text(given)
    bands = losses_by_frequency(subject.program, variables, text, ngrams)
    return {
        "counted": given.cache["counted"],
        "bands": [band_name(a, b) for a, b in zip(BANDS, (*BANDS[1:], np.inf), strict=True)],
        "layers": layers,
        "loss_of": of,
        "loss_by_frequency": [
            {
                "order": band.order,
                "band": band.name,
                "targets": band.targets,
                "loss": band.nats / band.targets if band.targets else None,
                "loss_off": band.off_nats / band.targets if band.targets else None,
            }
            for band in bands
        ],
    }


def _order(
    layer: LayerAddressing,
    used: OrderUsage,
    counts: NgramCounts,
    read: np.ndarray,
    norms: np.ndarray,
) -> Record:
    """read, norms: of all rows of the layer's table."""
    low, high = used.heads[0].offset, used.heads[-1].offset + used.heads[-1].rows
    band, own = band_of(read[low:high]), norms[low:high].astype(np.float64)
    ranks, times = rank_curve(counts.counts)
    hit_ranks, hit_times = rank_curve(read[low:high])
    of_bands = [own[band == i] for i in range(len(BANDS))]
    return {
        "ngrams": used.ngrams,
        "positions": used.positions,
        "zipf": used.zipf,
        "inseparable": used.inseparable,
        "heads": [
            {
                "rows": head.rows,
                "touched": head.touched,
                "dead": head.dead,
                "hits": list(head.hits),
                "sharing": head.sharing,
                "expected_sharing": head.expected_sharing,
            }
            for head in used.heads
        ],
        "ngram_curve": [ranks.tolist(), times.tolist()],
        "hits_curve": [hit_ranks.tolist(), hit_times.tolist()],
        "rows_by_band": [len(x) for x in of_bands],
        "mean_norm_by_band": [float(x.mean()) if len(x) else None for x in of_bands],
    }
