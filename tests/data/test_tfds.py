"""Any TFDS text data set by name or folder: made on the fly here by small builders."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from engram_jax.config.errors import UserError
from engram_jax.data import prepare, train_batches
from engram_jax.data import source_report as why
from engram_jax.data.cache import cache_root
from engram_jax.data.corpus import open_corpus

TEXTS = [f"example number {i} says {i * i}\n" * (1 + i % 3) for i in range(50)]


class EngramTestText(tfds.core.GeneratorBasedBuilder):
    """Fifty texts, among them a blank one and one that is not UTF-8; splits as `SPLITS` says."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: tuple[str, ...] = ("train",)

    def _info(self):
        text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
        features = tfds.features.FeaturesDict({"text": text, "title": text, "id": number})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        texts = (
            [*TEXTS, " \n", b"caf\xe9"] if split == "train" else [f"{split} {t}" for t in TEXTS[:8]]
        )
        for i, text in enumerate(texts):
            yield i, {"text": text, "title": f"title {i}", "id": i}


class EngramTestSplits(EngramTestText):
    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "validation", "test")


class EngramTestOnlyTest(EngramTestText):
    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("test",)


def build(builder, data_dir, file_format="array_record"):
    made = builder(data_dir=str(data_dir), file_format=file_format)
    made.download_and_prepare()
    return made


def open_tfds(config):
    """The corpus; no temporary folder is left, be the data set refused or not."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            return open_corpus(config.data, cache_root(config.data), lambda line: None)
        finally:
            tempfile.tempdir = before
            assert os.listdir(folder) == []


def test_by_folder_held_out_by_content(tmp_path, make_config):
    made = build(EngramTestText, tmp_path / "tfds")
    corpus = open_tfds(make_config(made.data_path, source="tfds"))
    train, valid = list(corpus.documents("train")), list(corpus.documents("validation"))
    assert sorted(train + valid) == sorted(TEXTS)
    assert 2 <= len(valid) <= 25
    counts = {reason: tally.count for reason, tally in corpus.report.skipped.items()}
    assert counts == {why.EMPTY: 1, why.NOT_UTF8: 1}
    again = open_tfds(make_config(made.data_path, source="tfds"))
    assert again.report.digest == corpus.report.digest
    assert list(again.documents("train")) == train


def test_its_own_validation_split_is_used_and_test_is_left_alone(tmp_path, make_config):
    made = build(EngramTestSplits, tmp_path / "tfds")
    corpus = open_tfds(make_config(made.data_path, source="tfds"))
    assert sorted(corpus.documents("train")) == sorted(TEXTS)
    assert sorted(corpus.documents("validation")) == sorted(f"validation {t}" for t in TEXTS[:8])


def test_by_name(tmp_path, make_config, monkeypatch):
    """A registered builder that is not prepared yet is prepared, as for any name of the
    catalogue."""
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    corpus = open_tfds(make_config("engram_test_text:1.0.0", source="tfds"))
    assert len(list(corpus.documents("train"))) + len(list(corpus.documents("validation"))) == 50
    assert (tmp_path / "tfds" / "engram_test_text" / "1.0.0").is_dir()


def test_another_text_key_and_long_documents_in_pieces(tmp_path, make_config):
    made = build(EngramTestText, tmp_path / "tfds")
    corpus = open_tfds(make_config(made.data_path, source="tfds", text_key="title"))
    texts = [*corpus.documents("train"), *corpus.documents("validation")]
    assert sorted(texts) == sorted(f"title {i}" for i in range(52))
    corpus = open_tfds(make_config(made.data_path, source="tfds", max_document_bytes=64))
    pieces = [*corpus.documents("train"), *corpus.documents("validation")]
    assert max(map(len, pieces)) <= 64
    assert sum(map(len, pieces)) == sum(map(len, TEXTS))
    assert corpus.report.cut_documents == sum(len(t) > 64 for t in TEXTS) > 0


def test_end_to_end(tmp_path, make_config):
    made = build(EngramTestText, tmp_path / "tfds")
    config = make_config(made.data_path, source="tfds")
    prepared = prepare(config, lambda line: None)
    batch = next(train_batches(prepared, config))
    assert batch["tokens"].shape == (4, 16)


def test_refusals(tmp_path, make_config):
    made = build(EngramTestText, tmp_path / "tfds")
    with pytest.raises(UserError, match=r"text_key = 'body'.*id, text, title"):
        open_tfds(make_config(made.data_path, source="tfds", text_key="body"))
    with pytest.raises(UserError, match=r"text_key = 'id'.*no string feature"):
        open_tfds(make_config(made.data_path, source="tfds", text_key="id"))
    with pytest.raises(UserError, match="TFDS knows no data set of that name"):
        open_tfds(make_config("no_such_data_set_at_all", source="tfds"))
    with pytest.raises(UserError, match=r"'c4/en:3\.1\.0': .* only with TensorFlow or Apache Beam"):
        open_tfds(make_config("c4/en:3.1.0", source="tfds"))
    with pytest.raises(UserError, match=r"'engram_test_text:9\.9\.9' cannot be read"):
        open_tfds(make_config("engram_test_text:9.9.9", source="tfds"))
    only_test = build(EngramTestOnlyTest, tmp_path / "tfds")
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        open_tfds(make_config(only_test.data_path, source="tfds"))


class EngramTestTwice(EngramTestText):
    """Every text twice; the first eight again in a validation split; a feature of images."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "validation")

    def _info(self):
        features = {"text": tfds.features.Text(), "words": tfds.features.Sequence({"w": np.int64})}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, split):
        for i, text in enumerate([*TEXTS, *TEXTS] if split == "train" else TEXTS[:8]):
            yield i, {"text": text, "words": {"w": [i]}}


def test_duplicates_are_left_out_as_of_a_folder(tmp_path, make_config):
    made = build(EngramTestTwice, tmp_path / "tfds")
    corpus = open_tfds(make_config(made.data_path, source="tfds"))
    assert sorted(corpus.documents("validation")) == sorted(TEXTS[:8])
    assert sorted(corpus.documents("train")) == sorted(TEXTS[8:])  # none that is held out
    assert corpus.report.skipped[why.DUPLICATE].count == 50 + 8
    with pytest.raises(UserError, match=r"text_key = 'words'.*no string feature of that name"):
        open_tfds(make_config(made.data_path, source="tfds", text_key="words"))


@pytest.mark.parametrize("how", ["cut off", "emptied", "overwritten", "missing"])
def test_damaged_records_are_one_line(how, tmp_path, make_config):
    made = build(EngramTestText, tmp_path / "tfds")
    (file,) = made.data_path.glob("*.array_record*")
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        half = len(content) // 2
        damaged = {"cut off": content[:half], "emptied": b"", "overwritten": bytes(len(content))}
        file.write_bytes(damaged[how])
    with pytest.raises(UserError) as caught:
        open_tfds(make_config(made.data_path, source="tfds"))
    line = str(caught.value)
    assert line.startswith("TFDS data set ") and line.isprintable() and len(line) < 900
