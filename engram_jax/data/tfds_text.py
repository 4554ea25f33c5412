"""The source "tfds": any TFDS text data set by name (ArrayRecord; TensorFlow is not needed)."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError, shown
from engram_jax.data import source_report as why
from engram_jax.data.documents import defect, split_text
from engram_jax.data.source_report import SourceReport
from engram_jax.data.split import hold_out, missed
from engram_jax.data.text_store import TRAIN, VALIDATION

# A split of one of these names is taken as the held-out one. A test split is never read.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class TfdsText:
    """config.data.path names a data set as `tfds.builder` does ("lm1b", "c4/en:3.1.0"; data below
    $TFDS_DATA_DIR), or a folder that holds a prepared one.

    Raises UserError when there is no such data set, when it cannot be prepared or read without
    TensorFlow, when it has no string feature named config.data.text_key, or no split to train on.
    """

    def __init__(self, config: DataConfig, log: Callable[[str], Any]) -> None:
        self._config = config
        self._builder = _open(config.path, log)
        key, features = config.text_key, self._builder.info.features
        names = sorted(features.keys()) if hasattr(features, "keys") else []
        if key not in names or not _is_text(features[key]):
            raise UserError(
                f"config.data.text_key = {key!r}: TFDS data set {config.path} has no string "
                f"feature of that name; its features are {shown(', '.join(names) or features)}"
            )
        splits = sorted(self._builder.info.splits)
        if TRAIN not in splits:
            raise UserError(
                f"TFDS data set {config.path}: no split 'train'; it has {', '.join(splits)}"
            )
        self.validation_split = next((name for name in VALIDATION_NAMES if name in splits), None)

    def manifest(self) -> list[Any]:
        """JSON values that change when the data set changes, made without reading an example."""
        info = self._builder.info
        used = (TRAIN, self.validation_split) if self.validation_split else (TRAIN,)
        sizes = [
            [name, list(info.splits[name].shard_lengths), info.splits[name].num_bytes]
            for name in used
        ]
        return ["tfds", info.full_name, str(self._builder.data_path), sizes, self._config.text_key]

    def scan(self, report: SourceReport) -> tuple[dict[str, np.ndarray], str]:
        """Read everything once: the numbers (int64) of each split's usable examples, and a digest
        of all their text. Raises UserError if a split has none."""
        kept, digests, sizes = self._scan_split(TRAIN, report, self._limit)
        if self.validation_split:
            held_ids, held_digests, held_sizes = self._scan_split(
                self.validation_split, report, None
            )
        else:
            fraction = self._config.validation_fraction
            held = hold_out(digests, sizes, fraction, source=f"TFDS data set {self._config.path}")
            held_ids, held_digests, held_sizes = kept[held], digests[held], sizes[held]
            kept, digests, sizes = kept[~held], digests[~held], sizes[~held]
            report.notes.append(
                "no validation split: some documents of 'train' are held out by content"
            )
        if self.validation_split:  # a text of both splits is held out
            mine = ~_among(digests, held_digests)
            report.skip_some(why.DUPLICATE, TRAIN, sizes[~mine])
            kept, digests, sizes = kept[mine], digests[mine], sizes[mine]
        if not len(kept) or not len(held_ids):
            raise UserError(
                f"TFDS data set {self._config.path}: {len(kept)} usable texts to train on and "
                f"{len(held_ids)} to validate on; both need some"
            )
        report.train_documents, report.train_bytes = len(kept), int(sizes.sum())
        report.validation_documents, report.validation_bytes = len(held_ids), int(held_sizes.sum())
        if not self.validation_split and (
            note := missed(report.validation_bytes, report.train_bytes, fraction)
        ):
            report.notes.append(note)
        digest = hashlib.sha256(digests.tobytes() + b"|" + held_digests.tobytes()).hexdigest()
        return {TRAIN: kept, VALIDATION: held_ids}, digest

    def documents(self, split: str, ids: np.ndarray) -> Iterator[str]:
        """The texts of the examples `ids`; those longer than max_document_bytes in parts."""
        name = self.validation_split if split == VALIDATION and self.validation_split else TRAIN
        source = self._source(name)
        for i in ids.tolist():
            for piece in split_text(self._text(source, name, i), self._config.max_document_bytes):
                yield piece.decode()

    def _source(self, split: str) -> Any:
        """Random access to a split's records. Raises UserError if there are not as many as the
        data set says."""
        with self._readable(split):
            source = self._builder.as_data_source(split)
            there = len(source)
        said = self._builder.info.splits[split].num_examples
        if there != said:
            raise UserError(
                f"TFDS data set {self._config.path}: split {split!r} has {there:,} records, its"
                f" description says {said:,}; prepare it again"
            )
        return source

    def _text(self, source: Any, split: str, number: int) -> bytes:
        with self._readable(f"{split}[{number}]"):
            return _bytes(source[number][self._config.text_key])

    @contextlib.contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Whatever TFDS, ArrayRecord or a feature's decoder raises becomes one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = shown(" ".join(str(error).split()), quoted=False)
            raise UserError(
                f"TFDS data set {self._config.path}: {what} cannot be read"
                f" ({type(error).__name__}: {reason}); files are missing or damaged: prepare it"
                " again"
            ) from error

    @property
    def _limit(self) -> int | None:
        return self._config.max_megabytes * 1_000_000 or None

    def _scan_split(
        self, name: str, report: SourceReport, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(numbers int64 [n], digests uint8 [n, 16], bytes int64 [n]) of the usable examples."""
        source = self._source(name)
        numbers: list[int] = []
        sizes: list[int] = []
        digests = bytearray()
        total = 0
        for i in range(len(source)):
            if limit is not None and total >= limit:
                report.skip(why.OVER_LIMIT, f"{name}[{i}:{len(source)}]", 0, len(source) - i)
                break
            text = self._text(source, name, i)
            if reason := defect(text):
                report.skip(reason, f"{name}[{i}]", len(text))
                continue
            numbers.append(i)
            sizes.append(len(text))
            digests += hashlib.sha256(text).digest()[:16]
            total += len(text)
            report.cut_documents += len(text) > self._config.max_document_bytes
        ids, found = np.asarray(numbers, np.int64), np.asarray(sizes, np.int64)
        ordered = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16)
        first = _first_of_equals(ordered)
        report.skip_some(why.DUPLICATE, name, found[~first])
        return ids[first], ordered[first], found[first]


@contextlib.contextmanager
def _no_leavings() -> Iterator[None]:
    """Remove the empty temporary folder that TFDS leaves when it opens a builder that is not
    prepared (`DatasetInfo.initialize_from_bucket`)."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="engram_jax-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@_no_leavings()
def _open(name: str, log: Callable[[str], Any]) -> tfds.core.DatasetBuilder:
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(str(folder))
        else:
            builder = tfds.builder(name)
            if not builder.is_prepared():
                log(f"data: TFDS data set {name} is not on this machine yet: downloading it")
                builder = tfds.builder(name, file_format="array_record")
                builder.download_and_prepare()
        builder.as_data_source(next(iter(builder.info.splits)))
    except tfds.core.registered.DatasetNotFoundError as error:
        if _has_code(name):
            reason = (
                "neither a folder with a prepared TFDS data set nor prepared below $TFDS_DATA_DIR, "
                "and TFDS can prepare it only with TensorFlow or Apache Beam; do that where they "
                "are, with file_format='array_record', and give the folder"
            )
        else:
            reason = (
                "TFDS knows no data set of that name, and it is not a folder with a prepared one"
            )
        raise UserError(f"config.data.path = {name!r}: {reason}") from error
    except Exception as error:  # anything a builder's own code raises: downloads, formats, ...
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"TFDS data set {name!r} cannot be read ({type(error).__name__}: {reason}); it must be "
            "downloadable or prepared already, in the array_record format"
        ) from error
    return builder


def _has_code(name: str) -> bool:
    """Whether TFDS comes with a builder of that name, registered or not.

    It does not register the older ones, NAME.py in a folder by subject ("text/c4.py").
    """
    base = re.split("[/:]", name)[0]
    modules = Path(tfds.__file__).parent.glob("*/*.py")
    return any(module.stem == base for module in modules if module.stem != "__init__")


def _is_text(feature: Any) -> bool:
    """Whether a feature is one string: not a sequence of them, a number, an image ..."""
    try:
        return feature.shape == () and np.dtype(feature.np_dtype).kind in "OSU"
    except (AttributeError, TypeError, NotImplementedError):
        return False


def _first_of_equals(digests: np.ndarray) -> np.ndarray:
    """Which of the digests uint8 [n, 16] differ from all before them: bool [n]."""
    first = np.zeros(len(digests), bool)
    first[np.unique(_whole(digests), return_index=True)[1]] = True
    return first


def _among(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the digests are among others: bool [n]."""
    return np.isin(_whole(digests), _whole(others))


def _whole(digests: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> [n] of one value each."""
    return np.ascontiguousarray(digests).view("V16").reshape(-1)


def _bytes(text: bytes | str) -> bytes:
    return text.encode(errors="surrogateescape") if isinstance(text, str) else bytes(text)
