"""What rows of a memory answer to, for --mode=analyse: which are shown, their readers, rows like
them."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_jax.addressing import LayerAddressing
from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.analysis.row_readers import CanonicalText, RowReaders, head_of, order_of
from engram_jax.analysis.table_rows import nearest_rows
from engram_jax.config.errors import UserError, shown
from engram_jax.run.analysis_inputs import Given
from engram_jax.run.analysis_texts import addressed, counted, norms_of_rows, row_hits

SHOWN_READERS, SHOWN_ROWS = 6, 3  # of a row; rows of an order, by hits and by norm
Record = dict[str, Any]


def rows(given: Given) -> Record:
    """What some rows answer to: those of --ngram, the most read and the longest of every order."""
    subject, ngrams = given.model, counted(given)
    tokenizer, addressing = subject.loaded.tokenizer, subject.program.addressing
    assert addressing is not None
    layers = {}
    for layer in addressed(given):
        text = CanonicalText(addressing, tokenizer, layer.fill_id)
        read, norms = row_hits(given, layer), norms_of_rows(given, layer)
        chosen = _chosen_rows(given, layer, read, norms)
        near = {
            row: nearest_rows(subject.program, subject.variables[2], layer.layer_id, row)
            for row in chosen
        }
        wanted = [*chosen, *(int(row) for rows, _ in near.values() for row in rows)]
        readers = RowReaders(layer, ngrams, {head_of(layer, row) for row in wanted})
        found = {row: readers.of(row, SHOWN_READERS) for row in wanted}

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
