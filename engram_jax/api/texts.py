"""The text that a configuration names, as documents for training and for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from engram_jax.api.models import Source, configure
from engram_jax.data.array_store import Store
from engram_jax.data.run_data import open_data


@dataclass(frozen=True)
class Text:
    """A text, split and tokenised as launch.py does it.

    tokenizer: trained on it, or config.tokenizer.path. train, held_out: documents, int32 [n] each,
    the id that ends a document included. bytes_per_token: of the held-out ones; nats per token
    divided by it and by log 2 are bits per byte. description: the source, in words.
    """

    tokenizer: Tokenizer
    train: list[np.ndarray] = field(repr=False)
    held_out: list[np.ndarray] = field(repr=False)
    bytes_per_token: float
    description: str


def open_text(config: Source, log: Callable[[str], None] = print) -> Text:
    """The text of config.data, as a run of launch.py reads it: the same documents are held out, and
    the same tokenizer is trained or read. Kept in config.data.cache_dir, so that only the first
    call for a text takes its time.

    config: as for `configure`. log: called with every line that launch.py prints about it.

    Raises UserError for a text or a tokenizer that cannot be used.

    Example: `text = open_text(config); model = build(config, text.tokenizer)`, then
    `train(model, init(model), text.train)`.
    """
    prepared = open_data(configure(config), log, count_fgrams=False).prepared
    return Text(
        tokenizer=prepared.tokenizer,
        train=documents_of(prepared.store_train),
        held_out=documents_of(prepared.store_valid),
        bytes_per_token=prepared.bytes_per_token,
        description=prepared.report.source,
    )


def documents_of(store: Store) -> list[np.ndarray]:
    """The documents of a token store in their order, int32 [n] each."""
    return [store.tokens[a:b].astype(np.int32) for a, b in itertools.pairwise(store.starts)]
