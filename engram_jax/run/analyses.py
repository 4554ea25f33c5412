"""The analyses of --mode=analyse, each a function from what was opened to a record of JSON values.

The estimators are in engram_jax/analysis/; here are the texts that they read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from engram_jax.addressing import LayerAddressing
from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.analysis import depth
from engram_jax.analysis.cka import SMALLEST, soft_alignment
from engram_jax.analysis.entities import final_tokens_of_batch, labelled_tokens
from engram_jax.analysis.gates import gates_of_text
from engram_jax.analysis.row_readers import (
    CanonicalText,
    head_of,
    nearest_rows,
    order_of,
    readers,
    row_norms,
)
from engram_jax.analysis.sensitivity import Effect, losses_by_frequency, parts_of
from engram_jax.analysis.sensitivity import sensitivity as effects_of
from engram_jax.analysis.texts import TextBatches, batches_of, spread
from engram_jax.analysis.usage import (
    BANDS,
    NgramCounts,
    OrderUsage,
    band_name,
    band_of,
    count_ngrams,
    hits,
    rank_curve,
)
from engram_jax.analysis.usage import usage as usage_of
from engram_jax.checkpoint.workdir import TASK_ITEMS
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_file, read_text
from engram_jax.data.array_store import ArrayStore, array_store
from engram_jax.data.pipeline import trained_sequences
from engram_jax.run.analysis_inputs import Given
from engram_jax.run.task_sensitivity import task_effects

Record = dict[str, Any]

LONGEST_TEXT = 1 << 24  # bytes of --text, which is tokenised whole
SHOWN_READERS, SHOWN_ROWS = 6, 3  # of a row; rows of an order, by hits and by norm
_COUNTED = 1 << 18  # training tokens that are counted at a time


def lens(given: Given) -> Record:
    """LogitLens of the models."""
    text, of = _text(given)
    found = []
    for subject in _models(given):
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
        text, of = _text(given)
        entities = "runs of capitalised words that do not begin a sentence"
        pairs: Iterable[Any] = ((batch, final_tokens_of_batch(tokenizer, batch)) for batch in text)
    else:
        eos, vocab = second.loaded.eos_id, config.tokenizer.vocab_size
        store, positions = labelled_tokens(tokenizer, eos, vocab, path)
        numbers = np.unique(positions // config.data.seq_len)
        most = max(1, given.settings.text_tokens // config.data.seq_len)
        text = batches_of(store, config, numbers=numbers[spread(len(numbers), most)])
        of, entities = str(path), "labelled there"
        pairs = text.with_places(positions)
    models = [(s.program, s.variables) for s in (first, second)[: 2 if given.other else 1]]
    try:
        found = depth.similarity(models, pairs)
    except ValueError as error:
        raise UserError(
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
    text, of = _held_out(given)
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
        "affected": effect.affected,
        "rise_where_affected": effect.rise_where_affected,
    }


def gates(given: Given) -> Record:
    """The gates at the beginning of the text, or of a held-out document."""
    subject = given.model
    length = subject.program.config.data.seq_len
    if given.settings.text is not None:
        store, of = _given_text(given), str(given.settings.text)
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
        read = _hits(given, layer)
        norms = _norms(given, layer)
        layers[str(layer.layer_id)] = {
            str(order): _order(layer, usage_of(layer, ngrams[order]), ngrams[order], read, norms)
            for order in layer.orders
        }
    text, of = _held_out(given)
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


def rows(given: Given) -> Record:
    """What some rows answer to: those of --ngram, the most read and the longest of every order."""
    subject, ngrams = given.model, counted(given)
    tokenizer, addressing = subject.loaded.tokenizer, subject.program.addressing
    assert addressing is not None
    layers = {}
    for layer in addressed(given):
        text = CanonicalText(addressing, tokenizer, layer.fill_id)
        read, norms = _hits(given, layer), _norms(given, layer)
        chosen = _chosen_rows(given, layer, read, norms)
        near = {
            row: nearest_rows(subject.program, subject.variables[2], layer.layer_id, row)
            for row in chosen
        }
        wanted = [*chosen, *(int(row) for rows, _ in near.values() for row in rows)]
        found: dict[int, Any] = {}
        for order in layer.orders:
            own = [row for row in wanted if order_of(layer, row) == order]
            found |= readers(layer, ngrams[order], own, SHOWN_READERS)

        def entries(row: int, most: int, found: Any = found, text: Any = text) -> list[Record]:
            pairs = zip(found[row].windows[:most], found[row].counts[:most], strict=True)
            return [{"ngram": text(window), "count": int(count)} for window, count in pairs]

        layers[str(layer.layer_id)] = [
            {
                "row": row,
                "why": why,
                "order": order_of(layer, row),
                "head": head_of(layer, row) % layer.heads_per_order,
                "norm": float(norms[row]),
                "hits": int(read[row]),
                "different": found[row].total,
                "readers": entries(row, SHOWN_READERS),
                "nearest": [
                    {"row": int(other), "cosine": float(cosine), "readers": entries(int(other), 1)}
                    for other, cosine in zip(*near[row], strict=True)
                ],
            }
            for row, why in chosen.items()
        ]
    return {"counted": given.cache["counted"], "layers": layers}


def _chosen_rows(
    given: Given, layer: LayerAddressing, read: np.ndarray, norms: np.ndarray
) -> dict[int, str]:
    """Row -> why it is shown."""
    chosen: dict[int, str] = {}
    if given.settings.ngram:
        loaded = given.model.loaded
        ids = encode_batch(loaded.tokenizer, [given.settings.ngram])[0].ids
        if len(ids) < layer.orders[0]:
            raise UserError(
                f"--ngram={shown(given.settings.ngram, quoted=True)}: is {len(ids)} token(s), must"
                f" be {layer.orders[0]} at least"
            )
        addressing = given.model.program.addressing
        assert addressing is not None
        canonical = canonicalise(np.asarray(ids), addressing.compression)
        found = addresses(canonical, layer)[-1].reshape(len(layer.orders), -1)
        for order, rows in zip(layer.orders, found.tolist(), strict=True):
            if order <= len(ids):
                chosen |= dict.fromkeys(rows, f"{order} tokens of --ngram")
    for i, order in enumerate(layer.orders):
        first = i * layer.heads_per_order
        low = layer.offsets[first]
        high = low + sum(layer.head_sizes[first : first + layer.heads_per_order])
        for row in np.argsort(-read[low:high], kind="stable")[:SHOWN_ROWS] + low:
            chosen.setdefault(int(row), f"most read of the {order}-grams")
        # Among the rows that are read: others are as they were drawn.
        length = np.where(read[low:high] > 0, norms[low:high], -1)
        for row in np.argsort(-length, kind="stable")[:SHOWN_ROWS] + low:
            chosen.setdefault(int(row), f"longest of the {order}-grams")
    return chosen


def addressed(given: Given) -> list[LayerAddressing]:
    """The Engram layers' addressing."""
    addressing = given.model.program.addressing
    assert addressing is not None
    return [x for x in addressing.layers.values() if isinstance(x, LayerAddressing)]


def counted(given: Given) -> dict[int, NgramCounts]:
    """The n-grams of the first training batches, each sequence once, by order."""
    if "ngrams" not in given.cache:
        assert given.data is not None and given.model.program.addressing is not None
        given.tell("counting the training text's n-grams")
        data, step = given.data.config.data, given.model.loaded.step
        wanted = max(1, given.settings.tokens // (data.batch_size * data.seq_len))
        prepared, config = given.data.prepared, given.data.config
        sequences, numbers = trained_sequences(prepared, config, min(step, wanted))
        each = max(1, _COUNTED // data.seq_len)
        texts = (
            (batch["tokens"], batch["segments"])
            for start in range(0, len(numbers), each)
            for batch in [sequences.batch(numbers[start : start + each])]
        )
        layer = addressed(given)[0]  # all of them read the same n-grams
        given.cache["ngrams"] = count_ngrams(given.model.program.addressing, layer, texts)
        given.cache["counted"] = {
            "tokens": len(numbers) * data.seq_len,
            "all": wanted >= step,
            "steps": min(step, wanted),
        }
    return given.cache["ngrams"]


def _hits(given: Given, layer: LayerAddressing) -> np.ndarray:
    name = f"hits/{layer.layer_id}"
    if name not in given.cache:
        given.cache[name] = hits(layer, counted(given))
    return given.cache[name]


def _norms(given: Given, layer: LayerAddressing) -> np.ndarray:
    name = f"norms/{layer.layer_id}"
    if name not in given.cache:
        program, memory = given.model.program, given.model.variables[2]
        given.cache[name] = row_norms(program, memory, layer.layer_id)
    return given.cache[name]


def _models(given: Given) -> list[Any]:
    return [given.model, *([given.other] if given.other else [])]


def _text(given: Given) -> tuple[TextBatches, str]:
    """--text, or held-out sequences; and its name."""
    if given.settings.text is None:
        return _held_out(given)
    config, most = given.model.program.config, given.settings.text_tokens
    return batches_of(_given_text(given), config, most=most), str(given.settings.text)


def _held_out(given: Given) -> tuple[TextBatches, str]:
    assert given.data is not None
    store, config = given.data.prepared.store_valid, given.model.program.config
    text = batches_of(store, config, most=given.settings.text_tokens)
    there = len(text.sequences)
    part = "" if len(text.numbers) == there else f"{len(text.numbers):,} of {there:,} sequences of "
    return text, f"{part}the held-out split"


def _given_text(given: Given) -> ArrayStore:
    """--text as a document."""
    if "text" not in given.cache:
        path, loaded = given.settings.text, given.model.loaded
        assert path is not None
        with open_file(path, "--text") as file:
            if (size := file.seek(0, 2)) > LONGEST_TEXT:
                raise UserError(
                    f"--text={shown(path)}: {size:,} bytes; must be at most {LONGEST_TEXT:,}"
                )
        ids = encode_batch(loaded.tokenizer, [read_text(path, "--text")])[0].ids
        if not ids:
            raise UserError(f"--text={shown(path)}: has no token")
        vocab = given.model.program.config.tokenizer.vocab_size
        given.cache["text"] = array_store([[*ids, loaded.eos_id]], vocab)
    return given.cache["text"]
