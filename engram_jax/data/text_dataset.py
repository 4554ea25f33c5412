"""A TFDS builder for collected documents: two splits of {"text"} in ArrayRecord files.

TensorFlow is not needed to write or to read them. Documents lie in the order of their digests, so
the data set is a function of the set of documents alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from engram_jax.data.documents import Spool

TRAIN, VALIDATION = "train", "validation"


class EngramText(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Documents of a spool as a TFDS data set; `held_out` says which are for validation."""

    VERSION = tfds.core.Version("1.0.0")
    name = "engram_text"

    def __init__(self, *, spool: Spool, held_out: np.ndarray, **kwargs: Any) -> None:
        self._spool = spool
        self._held_out = held_out
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text of this machine or of a folder, one example per document.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # the spool's order is by digest, and to be kept
        )

    def _split_generators(
        self, dl_manager: Any
    ) -> dict[str, Iterator[tuple[int, dict[str, bytes]]]]:
        del dl_manager
        order = self._spool.digest_order()
        held = self._held_out[order]
        return {
            TRAIN: self._generate_examples(order[~held]),
            VALIDATION: self._generate_examples(order[held]),
        }

    def _generate_examples(self, order: np.ndarray) -> Iterator[tuple[int, dict[str, bytes]]]:
        for key, text in enumerate(self._spool.read(order)):
            yield key, {"text": text}


def write(spool: Spool, held_out: np.ndarray, folder: Path) -> None:
    """Write the data set below `folder`."""
    with contextlib.redirect_stdout(io.StringIO()), _no_progress_bars():
        EngramText(
            spool=spool, held_out=held_out, data_dir=str(folder), file_format="array_record"
        ).download_and_prepare()


def read(folder: Path, split: str) -> Iterator[str]:
    """The documents of one split, in order, one at a time."""
    builder = tfds.builder_from_directory(str(folder / EngramText.name / str(EngramText.VERSION)))
    for example in builder.as_data_source(split):
        yield example["text"].decode()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()
