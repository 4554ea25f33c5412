"""Opens config.data's source, whichever it is, as a cached, fingerprinted set of documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError
from engram_jax.config.extras import require
from engram_jax.config.given_files import load_array
from engram_jax.data import source_report as why
from engram_jax.data import text_store
from engram_jax.data.cache import build_once, key_of, read_json, write_json
from engram_jax.data.documents import Spool, split_text
from engram_jax.data.folder_text import FolderText
from engram_jax.data.large_documents import MOST, cut_large, large_documents
from engram_jax.data.local_text import LIBRARY, LocalText
from engram_jax.data.near_duplicates import resembling
from engram_jax.data.source_report import SourceReport
from engram_jax.data.split import below, hold_out, missed

# Increase it when the same files would be prepared differently.
FORMAT = 1
# Increase it when that may be so of some: all are then read again, and what they give is compared
# by content. 2: large documents are cut; formats are told apart.
READING = 2

_MIN_PIECE = 1 << 10


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in two splits ("train", "validation").

    report: what was kept and skipped, and the digest: equal for equal documents in equal splits.
    """

    report: SourceReport
    _read: Callable[[str], Iterator[str]]

    def documents(self, split: str) -> Iterator[str]:
        """The texts of a split in their fixed order, one at a time."""
        return self._read(split)


def open_corpus(config: DataConfig, cache: Path, log: Callable[[str], Any] = print) -> Corpus:
    """Prepare config.data's text, or find it prepared below `cache`.

    Names, sizes and modification times decide whether it is prepared already; the stored text is
    named by a hash of its content. Raises UserError for an unusable source.
    """
    if config.near_duplicates:
        require("lab", "config.data.near_duplicates")
    if config.source == "tfds":
        return _open_tfds(config, cache, log)
    source: LocalText | FolderText
    if config.source == "local":
        source, report = LocalText(config), SourceReport(source=LIBRARY)
    else:
        report = SourceReport(source=config.path)
        source = FolderText(config, report)
    entry = cache / "sources" / key_of(FORMAT, READING, source.manifest(), _settings(config))

    def make(folder: Path) -> None:
        log(f"data: reading {report.source}")
        spool = Spool(folder / "spool", report, config.max_megabytes * 1_000_000 or None)
        try:
            source.collect(spool)
            key = _store(spool, config, cache, report)
        finally:
            spool.close()
        write_json(folder / "source.json", {"dataset": key, "report": report.to_dict()})

    def dataset(folder: Path) -> Path:
        found = read_json(folder / "source.json") or {}
        return cache / "texts" / found.get("dataset", "none")

    build_once(entry, make, valid=lambda folder: dataset(folder).is_dir())
    return Corpus(_stored_report(entry), partial(text_store.read, dataset(entry)))


def _stored_report(entry: Path) -> SourceReport:
    found = read_json(entry / "source.json")
    return SourceReport.from_dict(found["report"] | {"digest": found["dataset"]})


def _settings(config: DataConfig) -> list[Any]:
    found: list[Any] = [
        config.max_document_bytes,
        config.validation_fraction,
        config.max_megabytes,
    ]
    return [*found, config.near_duplicates] if config.near_duplicates else found


def _store(spool: Spool, config: DataConfig, cache: Path, report: SourceReport) -> str:
    """Split the spool's documents and store them; returns their key, a hash of content."""
    if not len(spool):
        skipped = ", ".join(f"{tally.count:,} {reason}" for reason, tally in report.skipped.items())
        raise UserError(f"{report.source}: no text to train on (left out: {skipped or 'nothing'})")
    fraction, decided = config.validation_fraction, np.empty(0, np.int8)
    if len(np.unique(spool.origins)) == 1:
        spool = _cut_small(spool, config, report)
    elif len(large := large_documents(spool)):
        whole, spool = spool, Spool(spool.path.with_name("spool-cut"), report)
        decided = cut_large(whole, spool, large, fraction, config.max_document_bytes)
        report.notes.append(
            f"{len(large):,} document(s) of more than {MOST:.0%} of the text: a part of each is"
            " held out"
        )
    try:
        sizes = spool.sizes
        if len(decided):
            held = np.where(decided < 0, _by_content(spool, fraction), decided == 1)
        else:
            held = hold_out(spool.digests, sizes, fraction, spool.origins, report.source)
        near = _near_duplicates(spool, held, config, report)
        train = ~held & ~near
        report.train_documents, report.validation_documents = int(train.sum()), int(held.sum())
        report.train_bytes, report.validation_bytes = (
            int(sizes[train].sum()),
            int(sizes[held].sum()),
        )
        if note := missed(report.validation_bytes, report.train_bytes, fraction):
            report.notes.append(note)
        digests = sorted(
            d.tobytes().hex() + "-+"[int(h)]
            for d, h, out in zip(spool.digests, held, near, strict=True)
            if not out
        )
        key = key_of(FORMAT, digests)
        build_once(cache / "texts" / key, partial(text_store.write, spool, held, left_out=near))
    finally:
        spool.close()
    return key


def _by_content(spool: Spool, fraction: float) -> np.ndarray:
    """As `hold_out`, where other documents fill both sides already: bool [documents]."""
    _, first, group = np.unique(spool.origins, return_index=True, return_inverse=True)
    return below(spool.digests[first], fraction)[group]


def _near_duplicates(
    spool: Spool, held: np.ndarray, config: DataConfig, report: SourceReport
) -> np.ndarray:
    """Which training documents nearly are held-out ones, counted as skipped: bool [documents].

    They are taken from training: the held-out text is then the same for every similarity that is
    asked for, so that losses can be compared, and stays a fair sample of the source.
    """
    if not config.near_duplicates:
        return np.zeros(len(held), bool)
    left_out = resembling(spool.read, held, config.near_duplicates)
    sizes = spool.sizes
    for number in np.flatnonzero(left_out).tolist():
        (text,) = spool.read(np.array([number]))
        start = " ".join(text[:60].decode(errors="ignore").split())
        report.skip(why.NEAR_DUPLICATE, repr(start), int(sizes[number]))
    if left_out[~held].all():
        raise UserError(
            f"{report.source}: every training document has a Jaccard similarity of at least"
            f" config.data.near_duplicates = {config.near_duplicates} to a held-out one"
        )
    return left_out


def _cut_small(spool: Spool, config: DataConfig, report: SourceReport) -> Spool:
    """Split a single document into parts that each count as one, so that some can be held out."""
    piece_bytes = min(
        max(_MIN_PIECE, int(config.validation_fraction * spool.bytes)), config.max_document_bytes
    )
    small = Spool(spool.path.with_name("spool-small"), report)
    for text in spool.read(np.arange(len(spool))):
        for piece in split_text(text, piece_bytes):
            small.add(report.source, piece, len(small))
    report.notes.append(
        f"only one document: cut at line ends into {len(small):,} pieces, each on one side of the "
        "split"
    )
    return small


def _open_tfds(config: DataConfig, cache: Path, log: Callable[[str], Any]) -> Corpus:
    from engram_jax.data.tfds_text import TfdsText  # imports tensorflow_datasets, only if used

    source = TfdsText(config, log)
    key = key_of(FORMAT, READING, source.manifest(), _settings(config))

    def make(folder: Path) -> None:
        log(f"data: reading TFDS data set {config.path}")
        report = SourceReport(source=f"TFDS {config.path}")
        ids, digest = source.scan(report)
        for split in ids:
            np.save(folder / f"{split}.npy", ids[split])
        fingerprint = key_of(FORMAT, digest, _settings(config))
        write_json(folder / "source.json", {"dataset": fingerprint, "report": report.to_dict()})

    entry = build_once(cache / "sources" / key, make)
    splits = (text_store.TRAIN, text_store.VALIDATION)
    ids = {split: load_array(entry / f"{split}.npy") for split in splits}
    return Corpus(_stored_report(entry), lambda split: source.documents(split, ids[split]))
