"""Named texts that a model is evaluated on, beside the held-out split: files and folders.

A text is read as config.data reads a folder (text files, JSON records), whole: nothing is held out
of it, and no limit cuts it. Documents stand in an order that does not depend on the machine, by a
hash of their files' names, so that the first of them are a fair sample.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.addressing.tokenizer import tokenizer_fingerprint
from engram_jax.config import Config
from engram_jax.config.errors import UserError, shown
from engram_jax.data.cache import build_once, cache_root, key_of, read_json, write_json
from engram_jax.data.corpus import open_corpus
from engram_jax.data.documents import Spool
from engram_jax.data.folder_text import FolderText
from engram_jax.data.prepared import fingerprint_of
from engram_jax.data.source_report import SourceReport
from engram_jax.data.token_store import TokenStore, write_store

LONGEST = 1 << 28  # bytes of a document of `read_documents`
HELD_OUT = "held_out"  # the name of the run's own held-out split
_FORMAT = 1  # increase it when the same files would become other tokens or sizes


@dataclass(frozen=True)
class ReadText:
    """A text as tokens. store: with `token_bytes`. digest: equal for equal tokens and sizes."""

    name: str
    source: str
    store: TokenStore
    digest: str


def read_text(
    name: str,
    path: str,
    config: Config,
    tokenizer: Any,
    eos_id: int,
    where: str,
    log: Callable[[str], None],
) -> ReadText:
    """The documents of a file or folder, tokenised (cached); each ends with `eos_id`.

    config: of data its text_key, max_document_bytes and cache_dir decide. where: the flag or key
    that names the path, in errors. Raises UserError for a path that is not there, or holds no text.
    """
    if not Path(path).expanduser().exists():
        raise UserError(f"{where}: {shown(path)}: no such folder or file")
    data = dataclasses.replace(config.data, source="folder", path=path)
    report = SourceReport(source=path)
    source = FolderText(data, report)
    key = key_of(
        *(_FORMAT, source.manifest(), data.text_key, data.max_document_bytes),
        *(tokenizer_fingerprint(tokenizer), eos_id, config.tokenizer.vocab_size),
    )

    def make(folder: Path) -> None:
        log(f"data: reading {shown(path)}")
        spool = Spool(folder / "spool", report)
        try:
            source.collect(spool)
            if not len(spool):
                left = ", ".join(f"{t.count:,} {why}" for why, t in report.skipped.items())
                raise UserError(f"{where}: {shown(path)}: no text (left out: {left or 'nothing'})")
            texts = (text.decode() for text in spool.read(np.arange(len(spool))))
            digest = key_of([d.tobytes().hex() for d in spool.digests])
            _write(folder, texts, config, tokenizer, eos_id)
        finally:
            spool.close()
        report.train_documents, report.train_bytes = len(spool), spool.bytes
        write_json(folder / "source.json", {"digest": digest, "report": report.to_dict()})

    return _read(name, path, build_once(cache_root(data) / "evaluations" / key, make), log)


def read_documents(
    path: str, config: Config, where: str, log: Callable[[str], None]
) -> Iterator[str]:
    """The documents of a file or folder as texts, in order, one at a time; long ones are not split.
    Arguments and errors as of `read_text`; an empty path is the held-out split of config.data."""
    cache = cache_root(config.data)
    if not path:
        yield from open_corpus(config.data, cache, log).documents("validation")
        return
    if not Path(path).expanduser().exists():
        raise UserError(f"{where}: {shown(path)}: no such folder or file")
    whole = max(config.data.max_document_bytes, LONGEST)
    data = dataclasses.replace(config.data, source="folder", path=path, max_document_bytes=whole)
    report = SourceReport(source=path)
    source = FolderText(data, report)
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool", report)
        try:
            source.collect(spool)
            _tell_skipped(path, report, log)
            if not len(spool):
                raise UserError(f"{where}: {shown(path)}: no text")
            yield from (text.decode() for text in spool.read(np.arange(len(spool))))
        finally:
            spool.close()


def held_out_fingerprint(
    config: Config, tokenizer: Any, eos_id: int, log: Callable[[str], None]
) -> str:
    """The fingerprint of the data that config.data's held-out split is of (data/prepared.py)."""
    report = open_corpus(config.data, cache_root(config.data), log).report
    return fingerprint_of(config, report, tokenizer, eos_id)


def read_held_out(
    config: Config, tokenizer: Any, eos_id: int, log: Callable[[str], None]
) -> tuple[ReadText, str]:
    """The held-out split of config.data with the bytes of its tokens (cached), and the fingerprint
    of the data that it is of (data/prepared.py). Raises UserError as `open_corpus`."""
    cache = cache_root(config.data)
    corpus = open_corpus(config.data, cache, log)
    key = key_of(
        *(_FORMAT, corpus.report.digest, tokenizer_fingerprint(tokenizer), eos_id),
        config.tokenizer.vocab_size,
    )

    def make(folder: Path) -> None:
        log("data: tokenising the held-out split")
        _write(folder, corpus.documents("validation"), config, tokenizer, eos_id)
        found = {"digest": corpus.report.digest, "report": corpus.report.to_dict()}
        write_json(folder / "source.json", found)

    source = f"the held-out split of {corpus.report.source}"
    folder = build_once(cache / "evaluations" / key, make)
    fingerprint = fingerprint_of(config, corpus.report, tokenizer, eos_id)
    return _read(HELD_OUT, source, folder, lambda line: None), fingerprint


def _write(folder: Path, texts: Iterator[str], config: Config, tokenizer: Any, eos_id: int) -> None:
    (folder / "tokens").mkdir()
    size = config.tokenizer.vocab_size
    write_store(folder / "tokens", texts, tokenizer, eos_id, size, text_of_tokens=True)


def _read(name: str, source: str, folder: Path, log: Callable[[str], None]) -> ReadText:
    stored = read_json(folder / "source.json")
    report = SourceReport.from_dict(stored["report"])
    store = TokenStore(folder / "tokens")
    store.verify()
    _tell_skipped(name, report, log)
    return ReadText(name, source, store, key_of(stored["digest"], len(store)))


def _tell_skipped(name: str, report: SourceReport, log: Callable[[str], None]) -> None:
    for why, tally in report.skipped.items():
        log(f"{shown(name)}: left out: {tally.count:,} {why}, for example {tally.examples[0]}")
