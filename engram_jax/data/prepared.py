"""Prepares corpus.py's text for training: tokenizer and token stores, cached."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engram_jax.addressing.tokenizer import tokenizer_fingerprint
from engram_jax.config import Config, DataConfig
from engram_jax.config.errors import UserError
from engram_jax.data.array_store import ArrayStore, Store
from engram_jax.data.cache import build_once, cache_root, key_of
from engram_jax.data.corpus import open_corpus
from engram_jax.data.mixed_tasks import MixedTasks, mix, mixture_of
from engram_jax.data.source_report import SourceReport
from engram_jax.data.token_store import TokenStore, write_store
from engram_jax.data.train_bpe import find_eos, open_tokenizer

ARRAYS = "arrays of tokens"


@dataclass(frozen=True)
class PreparedData:
    """The data that training reads.

    eos_id: ends every document in the stores. bytes_per_token: of the validation text, for losses
    in bits per byte. fingerprint: of documents, split, tokenizer and tasks; equal means the same
    token stream. tasks: what config.data.tasks mixed into the training text, None without.
    """

    tokenizer: Tokenizer
    tokenizer_path: Path
    eos_id: int
    store_train: Store
    store_valid: Store
    report: SourceReport
    fingerprint: str
    tasks: MixedTasks | None = None

    @property
    def bytes_per_token(self) -> float:
        return self.store_valid.bytes_per_token

    def summary(self) -> dict[str, Any]:
        """The description of the text that accompanies results measured on it, as JSON values."""
        report = self.report
        return {
            "source": report.source,
            "digest": report.digest,
            "python": platform.python_version(),
            "train_documents": report.train_documents,
            "train_bytes": report.train_bytes,
            "train_tokens": len(self.store_train),
            "validation_documents": report.validation_documents,
            "validation_bytes": report.validation_bytes,
            "validation_tokens": len(self.store_valid),
            "validation_bytes_per_token": self.bytes_per_token,
            **({} if self.tasks is None else self.tasks.summary()),
        }


def prepare(config: Config, log: Callable[[str], Any] = print) -> PreparedData:
    """Read config.data's text, train or load the tokenizer, tokenise both splits; or find all this
    in the cache. Safe to interrupt, and to run in several processes at once.

    Raises UserError for an unusable text or tokenizer.
    """
    cache = cache_root(config.data)
    corpus = open_corpus(config.data, cache, log)
    corpus.report.log(log)
    tokenizer, path = open_tokenizer(config.tokenizer, corpus, cache, log)
    eos_id = find_eos(tokenizer, config.tokenizer)
    mixture = mixture_of(config.data, corpus.report)
    key = fingerprint_of(config, corpus.report, tokenizer, eos_id)

    def make(folder: Path) -> None:
        log("data: tokenising")
        for split in ("train", "validation"):
            (folder / split).mkdir()
            texts = corpus.documents(split)
            if mixture is not None and split == "train":
                texts = mix(texts, corpus, mixture, folder)
            write_store(folder / split, texts, tokenizer, eos_id, config.tokenizer.vocab_size)

    folder = build_once(cache / "tokens" / key, make)
    train, valid = TokenStore(folder / "train"), TokenStore(folder / "validation")
    train.verify()
    valid.verify()
    tasks = None if mixture is None else MixedTasks(folder, train)
    for what, store in (("training", train), ("held-out", valid)):
        check_targets(what, store, config.data)
    log(
        f"data: {len(train):,} tokens to train on, {len(valid):,} held out, "
        f"{valid.bytes_per_token:.2f} bytes per token, tokenizer {path}"
    )
    if unknown := train.unknown_tokens:
        log(
            f"data: {unknown:,} of the training tokens ({unknown / len(train):.2%}) are the"
            " tokenizer's unknown token"
        )
    if tasks is not None:
        tasks.log(log)
    return PreparedData(tokenizer, path, eos_id, train, valid, corpus.report, key, tasks)


def fingerprint_of(config: Config, report: SourceReport, tokenizer: Tokenizer, eos_id: int) -> str:
    """`PreparedData.fingerprint` of a corpus with this report."""
    mixture = mixture_of(config.data, report)
    mixed = [] if mixture is None else [mixture.identity]
    return key_of(report.digest, tokenizer_fingerprint(tokenizer), eos_id, *mixed)


def check_targets(what: str, store: TokenStore, config: DataConfig) -> None:
    """Raises UserError for a text on which no loss is defined: a document's first token is not a
    target."""
    if len(store) <= store.documents:
        raise UserError(
            f"the {what} text has no token to predict: {store.documents:,} document(s),"
            f" {len(store):,} tokens; give more text, or another config.data.validation_fraction"
            f" (now {config.validation_fraction}; not used where the source has a split of its own)"
        )


def of_arrays(
    store: ArrayStore, tokenizer: Any, eos_id: int | None, held_out: ArrayStore | None = None
) -> PreparedData:
    """Documents that are arrays of tokens as `prepare` gives those of a text, without a text.

    tokenizer: None where there is none. held_out: None = the same documents.
    """
    report = SourceReport(source=ARRAYS, digest=store.digest, train_documents=store.documents)
    return PreparedData(
        tokenizer=tokenizer,
        tokenizer_path=Path(),
        eos_id=-1 if eos_id is None else eos_id,
        store_train=store,
        store_valid=store if held_out is None else held_out,
        report=report,
        fingerprint=store.digest,
    )
