"""Held-out losses target by target: by document, and by whether an n-gram was seen in training.

The targets of the held-out split stand in one order everywhere: that of the text, which is also
that of the batches. Every token is one but the first of a document.

An n-gram of context is the n tokens before the target, within document and sequence: the one whose
rows an Engram reads at the position that predicts the target. Raw token ids decide, so that the
classes are the same for all models of one tokenizer. It is seen if it stands anywhere in the
sequences that the run was trained on (evaluation/seen_ngrams.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.data.array_store import Store
from engram_jax.data.packing import PackedSequences
from engram_jax.data.pipeline import trained_sequences
from engram_jax.data.run_data import RunData
from engram_jax.evaluation.seen_ngrams import seen
from engram_jax.hardware.storage import replacing

ORDERS = (2, 3, 4)
_BLOCK = 1 << 18  # training tokens that are searched at a time


def held_out_sequences(data: RunData) -> PackedSequences:
    """The sequences of the held-out split."""
    config = data.config
    store = data.prepared.store_valid
    return PackedSequences(store, config.data.seq_len, config.tokenizer.pad_id, pad_tail=True)


def target_positions(store: Store) -> np.ndarray:
    """Where a store's targets stand in it: int64 [n], ascending."""
    target = np.ones(len(store), bool)
    target[store.starts[:-1]] = False
    return np.flatnonzero(target)


def documents_of(store: Store, positions: np.ndarray) -> np.ndarray:
    """The number of the document that every position of a store lies in: int32 [n]."""
    return np.searchsorted(store.starts, positions, side="right").astype(np.int32) - 1


@dataclass(frozen=True)
class SeenContexts:
    """Which targets' n-grams of context the run had been trained on.

    orders: K lengths n. flags: bool [n targets, K]. tokens: different training tokens.
    Without orders nothing was searched.
    """

    orders: tuple[int, ...]
    flags: np.ndarray
    tokens: int


def seen_contexts(data: RunData, batches: int) -> SeenContexts:
    """The targets' n-grams of context that stand in the first `batches` training batches.

    With more than train.seen_tokens different tokens in these nothing is searched.
    """
    config = data.config
    train, numbers = trained_sequences(data.prepared, config, batches)
    tokens = len(numbers) * train.seq_len
    sequences = held_out_sequences(data)
    store = sequences.store
    positions = target_positions(store)
    orders = ORDERS if tokens <= config.train.seen_tokens else ()

    def searched() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = max(1, _BLOCK // train.seq_len)
        for start in range(0, len(numbers), step):
            batch = train.batch(numbers[start : start + step])
            yield batch["tokens"], batch["positions"]

    flags = np.zeros((len(positions), 0), bool)
    if orders:
        held_out = sequences.batch(np.arange(len(sequences)))
        found = seen(
            *(held_out["tokens"], held_out["positions"]),
            searched(),
            orders,
            config.tokenizer.vocab_size,
        )
        # Sequence i predicts token i T + t + 1 at position t.
        flags = found.reshape(-1, len(orders))[positions - 1]
    return SeenContexts(orders, flags, tokens)


def write_documents(
    path: Path, store: Store, nats: np.ndarray, contexts: SeenContexts, step: int
) -> None:
    """Write the losses of the held-out documents, a row each, as an .npz archive.

    nats: float64 [targets], in order. The arrays, for D documents and K orders:

    document: int32 [D], its number in the store.
    nats: float64 [D], summed over its targets.
    targets: int64 [D].
    orders: int32 [K], lengths of n-grams; K = 0 if nothing was searched.
    seen_nats: float64 [D, K], summed over the targets whose n-gram of context was seen.
    seen_targets: int64 [D, K].
    step: int64 [], of the checkpoint.
    """
    count = store.documents
    document = documents_of(store, target_positions(store))

    def summed(weights: np.ndarray) -> np.ndarray:
        return np.bincount(document, weights, minlength=count)

    orders = len(contexts.orders)
    seen_nats, seen_targets = np.zeros((count, orders)), np.zeros((count, orders), np.int64)
    for k in range(orders):
        seen_nats[:, k] = summed(nats * contexts.flags[:, k])
        seen_targets[:, k] = summed(contexts.flags[:, k])
    arrays: dict[str, Any] = {
        "document": np.arange(count, dtype=np.int32),
        "nats": summed(nats),
        "targets": np.bincount(document, minlength=count),
        "orders": np.asarray(contexts.orders, np.int32),
        "seen_nats": seen_nats,
        "seen_targets": seen_targets,
        "step": np.int64(step),
    }
    with replacing(path, shared=False) as file:
        np.savez(file, **arrays)


def losses_by_context(
    contexts: SeenContexts, nats: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """{"2": {"seen": {"targets", "nats_per_token": {name: loss or None}}, "unseen": ..}, ..}.

    nats: float64 [targets] by name; a loss over no target is None.
    """
    found = {}
    for k, order in enumerate(contexts.orders):
        flags = contexts.flags[:, k]
        sides = {"seen": flags, "unseen": ~flags}
        found[str(order)] = {side: _mean(nats, chosen) for side, chosen in sides.items()}
    return found


def _mean(nats: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    targets = int(chosen.sum())
    means = {name: float(x[chosen].mean()) if targets else None for name, x in nats.items()}
    return {"targets": targets, "nats_per_token": means}


def context_lines(by_context: Mapping[str, Any], name: str) -> list[str]:
    """One model's losses of `losses_by_context` as lines for a terminal, [] if there are none."""
    lines = []
    for order, sides in by_context.items():
        parts = [_side(side, sides[side], name) for side in ("seen", "unseen")]
        lines.append(f"context {order}-gram   {'   '.join(parts)}")
    return lines


def _side(side: str, found: Mapping[str, Any], name: str) -> str:
    return f"{side} {shown(found['nats_per_token'][name])} over {found['targets']:,} tokens"


def shown(loss: float | None, digits: int = 3) -> str:
    """A loss as text; "-" for None, the loss over no target."""
    return "-" if loss is None else f"{loss:.{digits}f}"
