"""RAG: a passage of the training text, found by BM25, in front of the held-out text.

Retrieval-augmented generation (Lewis et al., arXiv 2005.11401) with a frozen model whose input
alone changes, as in Ram et al., "In-Context Retrieval-Augmented Language Models", arXiv 2302.00083:
a document is scored in chunks of c tokens, and the text before a chunk is the query.

Layout, within the trained length T = p + h + c - 1:

    [ passage, at most p | context: the h tokens before the chunk | chunk, its last token left out ]

All of it is one segment, positions go on from 0, and nothing stands between passage and context; so
the n-grams and the convolution at the seam read both. The passage takes context away, which is why
the same targets are scored four times: with the h tokens of context alone; with a passage that BM25
found; with a random one, as the control; and with context instead of a passage, T - c + 1 tokens.
Where there is no text before the chunk (a document's first), or none of its words is in the
training text, there is no passage.

Passages are windows of p tokens of the trained sequences, within a document; the last one of a
document overlaps the one before it. Words are letters, digits and underscores in lower case; BM25
is Lucene's form, k1 = 1.5, b = 0.75 (bm25s). The query's length is that with the lowest loss on the
tuning half (evaluation/neighbours.py). Held-out documents are not in the training text.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.data.array_store import Store
from engram_jax.data.long_documents import Sequences
from engram_jax.data.packing import Batch
from engram_jax.distributed import processes
from engram_jax.evaluation.held_out import Checkpoint, Evaluator
from engram_jax.evaluation.neighbours import (
    Measured,
    check_halves,
    open_neighbours,
    record,
    text_sequences,
    tunes,
)
from engram_jax.evaluation.target_losses import documents_of

QUERY_TOKENS = (16, 32, 64)
_WORD = re.compile(r"\w+")
_BLOCK = 1024  # sequences that are cut into passages at a time


@dataclass(frozen=True)
class Settings:
    """text: TRAINED or ALL (neighbours.py). chunk: c. passage: p. Tokens; 0 = T / 4 and T / 2."""

    text: str
    chunk: int = 0
    passage: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a store, all of one document, which begins at `document`."""

    document: int
    start: int
    end: int

    @property
    def targets(self) -> int:
        """All but the first token of a document."""
        return self.end - self.start - (self.start == self.document)


def chunks(store: Store, size: int) -> list[Chunk]:
    """Every document cut into chunks of `size` tokens; the last may be shorter."""
    return [
        Chunk(int(first), start, min(start + size, int(last)))
        for first, last in zip(store.starts[:-1], store.starts[1:], strict=True)
        for start in range(int(first), int(last), size)
    ]


def passages(sequences: Sequences, numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """The passages of these sequences: token ids, at most `size` each."""
    found: list[np.ndarray] = []
    for at in range(0, len(numbers), _BLOCK):
        batch = sequences.batch(numbers[at : at + _BLOCK])
        for tokens, positions in zip(batch["tokens"], batch["positions"], strict=True):
            cuts = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
            for start, end in pairwise(cuts):
                starts = range(start, max(end - size, start) + 1, size)
                found += [tokens[a : min(a + size, end)] for a in starts]
                if starts[-1] + size < end:
                    found.append(tokens[end - size : end])
    return found


def words(text: str) -> list[str]:
    """The terms that BM25 counts."""
    return _WORD.findall(text.lower())


class PassageIndex:
    """Passages of text, found by BM25. bytes: of the index and of the passages' token ids."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells every index it builds

        self._bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._bm25.index([words(text) for text in texts], show_progress=False)
        scores = self._bm25.scores
        self.bytes = sum(scores[key].nbytes for key in ("data", "indices", "indptr"))

    def best(self, query: str) -> int | None:
        """The number of the passage with the highest score; None if no word is in any."""
        ids = self._bm25.get_tokens_ids(words(query))
        if not ids:
            return None
        scores = self._bm25.get_scores_from_ids(ids)
        best = int(np.argmax(scores))
        return best if scores[best] > 0 else None


def batches(
    store: Store,
    pieces: Sequence[Chunk],
    before: Sequence[np.ndarray],
    context: int,
    shape: tuple[int, int],
    pad_id: int,
) -> Iterator[Batch]:
    """The chunks as batches [B, T], a sequence each: `before` (a passage, or nothing), at most
    `context` tokens of the document, the chunk without its last token.

    shape: (B, T). The last batch is filled with padding. Arrays as of data/packing.py.
    """
    for at in range(0, len(pieces), shape[0]):
        tokens = np.full(shape, pad_id, np.int32)
        targets, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.float32)
        some = zip(pieces[at : at + shape[0]], before[at : at + shape[0]], strict=True)
        for row, (piece, passage) in enumerate(some):
            start = max(piece.document, piece.start - context)
            text = store.tokens[start : piece.end].astype(np.int32)
            inputs = np.concatenate([passage, text[:-1]])
            end, count = len(inputs), piece.targets
            tokens[row, :end], segments[row, :end] = inputs, 1
            targets[row, end - count : end] = text[len(text) - count :]
            mask[row, end - count : end] = 1
        positions = np.where(segments > 0, np.arange(shape[1], dtype=np.int32), 0)
        yield {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": mask,
            "segments": segments,
            "positions": positions.astype(np.int32),
        }


class ChunkScorer:
    """Scores the held-out chunks with what stands before them."""

    def __init__(self, found: Checkpoint, pieces: Sequence[Chunk]) -> None:
        self._evaluator = Evaluator(found.program, found.data)
        self._state, self._pieces = found.state, pieces
        self._store = found.data.prepared.store_valid
        data = found.data.config.data
        self._shape = data.batch_size, data.seq_len
        self._pad = found.data.config.tokenizer.pad_id

    def __call__(
        self, before: Sequence[np.ndarray], context: int, chosen: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """(nats of the chunks' targets in order, float64; seconds per target).

        before: a passage for every chunk. chosen: bool [chunks], which to score; None = all.
        """
        keep = range(len(self._pieces)) if chosen is None else np.flatnonzero(chosen).tolist()
        pieces, passages = [self._pieces[i] for i in keep], [before[i] for i in keep]
        made = list(batches(self._store, pieces, passages, context, self._shape, self._pad))
        started = time.perf_counter()
        losses = list(self._evaluator.nats(self._state, made))
        seconds = time.perf_counter() - started
        found = [x[b["loss_mask"] > 0] for x, b in zip(losses, made, strict=True)]
        nats = np.concatenate(found).astype(np.float64)
        return nats, seconds / max(1, len(nats))  # a chunk of one token may have no target


def layout(settings: Settings, length: int) -> tuple[int, int, int]:
    """(c, p, h) for sequences of `length` tokens. Raises UserError where they do not fit."""
    chunk, passage = settings.chunk or max(1, length // 4), settings.passage or length // 2
    context = length - passage - chunk + 1
    if context < 1:
        raise UserError(
            f"--rag_chunk={chunk} and --rag_passage={passage}: together at most data.seq_len ="
            f" {length}"
        )
    return chunk, passage, context


def evaluate_rag(config: Config, workdir: Path, step: str, settings: Settings) -> dict[str, Any]:
    """The held-out loss of a checkpoint with and without passages of its training text.

    Returns `neighbours.record`. Raises UserError as `open_neighbours` and `layout`.
    """
    chunk, passage, context = layout(settings, config.data.seq_len)
    tell = processes.stages(sys.stderr)  # standard output is the result
    tell("reading the checkpoint and its text")
    found = open_neighbours(config, workdir, step, "--neighbours=rag")
    tuned = tunes(found.data)
    check_halves(tuned, "--neighbours=rag")
    tokenizer, store = found.data.prepared.tokenizer, found.data.prepared.store_valid
    pieces = chunks(store, chunk)
    tuning = documents_of(store, np.asarray([piece.start for piece in pieces])) % 2 == 0

    tell("indexing passages of the training text")
    started = time.perf_counter()
    known = passages(*text_sequences(found.data, settings.text, found.step), passage)
    index = PassageIndex(tokenizer.decode_batch([ids.tolist() for ids in known]))
    build_seconds = time.perf_counter() - started
    nothing = np.zeros(0, np.int32)

    def retrieved(tokens: int) -> tuple[list[int | None], float]:
        """The passages' numbers for queries of so many tokens, and seconds per chunk."""
        spans = [(max(x.document, x.start - tokens), x.start) for x in pieces]
        started = time.perf_counter()
        queries = tokenizer.decode_batch([store.tokens[a:b].tolist() for a, b in spans])
        best = [index.best(query) for query in queries]
        return best, (time.perf_counter() - started) / len(pieces)

    def texts(numbers: Sequence[int | None]) -> list[np.ndarray]:
        return [nothing if i is None else known[i] for i in numbers]

    tell(f"choosing the query's length; then scoring {len(pieces):,} pieces of held-out text")
    score = ChunkScorer(found, pieces)
    score([nothing] * len(pieces), context, np.arange(len(pieces)) < 1)  # compiles
    losses = {}
    for length in QUERY_TOKENS:
        nats, _ = score(texts(retrieved(length)[0]), context, tuning)
        losses[length] = float(nats.mean())
    query = min(losses, key=losses.__getitem__)
    best, search_seconds = retrieved(query)
    rng = np.random.default_rng(0)
    random = [None if i is None else int(rng.integers(len(known))) for i in best]

    bytes_kept = index.bytes + sum(ids.nbytes for ids in known)
    searching = search_seconds * len(pieces) / len(tuned)
    full, full_seconds = score([nothing] * len(pieces), context + passage)
    short, short_seconds = score([nothing] * len(pieces), context)
    with_best, best_seconds = score(texts(best), context)
    with_random, random_seconds = score(texts(random), context)
    return record(
        "rag",
        found,
        {
            "text": settings.text,
            "passages": len(known),
            "passage_tokens": passage,
            "chunk_tokens": chunk,
            "context_tokens": context,
            "query_tokens": query,
            "chunks": len(pieces),
            "chunks_without_passage": sum(i is None for i in best),
            "build_seconds": build_seconds,
        },
        tuned,
        [
            Measured("context instead of a passage", full, 0, full_seconds),
            Measured("short context alone", short, 0, short_seconds),
            Measured("with a passage by BM25", with_best, bytes_kept, best_seconds + searching),
            Measured("with a random passage", with_random, bytes_kept, random_seconds),
        ],
    )
