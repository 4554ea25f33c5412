"""Text in every wrong form: what is read of it, what is left out and why, and what is refused.

A line of a table: the files, the documents that are read, and the reasons for what is not.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError
from engram_jax.data import source_report as why
from engram_jax.data import text_store
from engram_jax.data.corpus import Corpus, open_corpus
from engram_jax.data.documents import Spool, foreign_format
from engram_jax.data.folder_text import FolderText
from engram_jax.data.large_documents import large_documents
from engram_jax.data.source_report import SourceReport
from engram_jax.data.split import missed

GOOD = b"a good document, that is text\n"


def collected(folder: Path) -> tuple[list[str], SourceReport]:
    """The documents below a folder, and the report."""
    report = SourceReport()
    source = FolderText(DataConfig(source="folder", path=str(folder)), report)
    spool = Spool(folder.parent / "spool", report)
    try:
        source.collect(spool)
        return [text.decode() for text in spool.read(np.arange(len(spool)))], report
    finally:
        spool.close()


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def said(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 900, line
    return line


# ---- JSON ----------------------------------------------------------------------------------------

A, B = b'{"text": "first"}', b'{"text": "second", "id": 3}'
JSON: dict[str, tuple[str, bytes, list[str], dict[str, int]]] = {
    "array": ("x.json", b"[" + A + b", " + B + b"]", ["first", "second"], {}),
    "array over lines": ("x.json", b"[\n " + A + b",\n " + B + b"\n]\n", ["first", "second"], {}),
    "array after a mark": ("x.json", codecs.BOM_UTF8 + b"[" + A + b"]", ["first"], {}),
    "empty array": ("x.json", b"[]", [], {}),
    "array of others": ("x.json", b'[1, "a", null, [2], ' + A + b"]", ["first"], {why.BAD_JSON: 4}),
    "array cut off": ("x.json", b"[" + A + b", " + B[:9], ["first"], {why.BAD_JSON: 1}),
    "array without an end": ("x.json", b"[" + A, ["first"], {why.BAD_JSON: 1}),
    "array and more": ("x.json", b"[" + A + b"] x", ["first"], {why.BAD_JSON: 1}),
    "array, broken inside": (
        "x.json",
        b"[" + A + b", {, " + B + b"]",
        ["first"],
        {why.BAD_JSON: 1},
    ),
    "array, not UTF-8": ("x.json", b"[" + A + b', {"text": "\xff"}]', ["first"], {why.NOT_UTF8: 1}),
    "array without the key": ("x.json", b'[{"body": "x"}, ' + A + b"]", ["first"], {why.NO_KEY: 1}),
    "array of texts": ("x.json", b'["one", "two", ' + A + b"]", ["first"], {why.BAD_JSON: 2}),
    "one object": ("x.json", b'{\n "text": "first"\n}\n', ["first"], {}),
    "objects over lines": (
        "x.json",
        b'{"text":\n"first"}\n{"text":\n"second"}',
        ["first", "second"],
        {},
    ),
    "lines in .json": ("x.json", A + b"\n{broken\n" + B, ["first", "second"], {why.BAD_JSON: 1}),
    "a number": ("x.json", b"12", [], {why.BAD_JSON: 1}),
    "no JSON": ("x.json", b"hello", [], {why.BAD_JSON: 1}),
    "deep": ("x.json", b"[" * 100_000, [], {why.BAD_JSON: 1}),
    "CR lines": ("x.jsonl", A + b"\r" + B + b"\r", ["first", "second"], {}),
    "CR LF lines": ("x.jsonl", A + b"\r\n" + B + b"\r\n", ["first", "second"], {}),
    "mixed lines": ("x.ndjson", A + b"\n\r\n\r" + B, ["first", "second"], {}),
    "array in .jsonl": ("x.jsonl", b"[" + A + b"]", [], {why.BAD_JSON: 1}),
    "text is null": ("x.json", b'[{"text": null}, ' + A + b"]", ["first"], {why.NOT_TEXT: 1}),
    "lone surrogate": (
        "x.json",
        b'[{"text": "\\ud800"}, ' + A + b"]",
        ["first"],
        {why.NOT_UTF8: 1},
    ),
    "upper case": ("X.JSON", b"[" + A + b"]", ["first"], {}),
}


@pytest.mark.parametrize("case", JSON)
def test_json_files(case, tmp_path):
    name, content, documents, reasons = JSON[case]
    texts, report = collected(written(tmp_path / "t", {name: content, "good.txt": GOOD}))
    assert sorted(texts) == sorted([*documents, GOOD.decode()])
    assert {reason: tally.count for reason, tally in report.skipped.items()} == reasons


def test_a_long_array_is_read_in_pieces(tmp_path):
    """Records across the pieces that a file is read in, one of them longer than a piece."""
    records = [
        {"text": f"document {i} {'é' * (1_500_000 if i == 3 else 700)}"} for i in range(3000)
    ]
    path = written(tmp_path / "t", {"x.json": json.dumps(records, ensure_ascii=False).encode()})
    texts, report = collected(path)
    whole = {t for t in texts if len(t) < 1000 and not t.startswith("document 3 ")}
    assert whole == {r["text"] for i, r in enumerate(records) if i != 3}
    assert set(report.skipped) <= {why.DUPLICATE} and report.cut_documents == 1  # equal pieces


KEYS = {
    "only others": ({"a.jsonl": b'{"body": "x"}'}, "config.data.text_key = 'text': nothing has"),
    "mostly others": (
        {"a.jsonl": b'{"body": "' + b"x" * 99 + b'"}', "good.txt": GOOD},
        "most of the text is in JSON lines without that key",
    ),
    "a key with a newline": ({"a.jsonl": b'{"a\\nb": "x"}'}, r"the records have a\nb"),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_text_key_that_is_not_there(case, tmp_path):
    files, words = KEYS[case]
    assert words in said(lambda: collected(written(tmp_path / "t", files)))


def test_some_records_without_the_key_are_counted(tmp_path):
    files = {"a.jsonl": b'{"body": "x"}\n', "b.jsonl": A, "good.txt": 5 * GOOD, "c.json": b"{}" * 9}
    texts, report = collected(written(tmp_path / "t", files))
    assert sorted(texts) == sorted([(5 * GOOD).decode(), "first"])
    assert report.skipped[why.NO_KEY].count == 10
    assert any("without the key 'text' (config.data.text_key) have body" in n for n in report.notes)


# ---- other formats -------------------------------------------------------------------------------


def zipped(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "made.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    return (folder / "made.zip").read_bytes()


ENGLISH = "plain English text, and some more of it"
FORMATS = {
    "gzip": (gzip.compress(GOOD), "gunzip"),
    "zip": (None, "unzip"),
    "bzip2": (b"BZh91AY&SY", "bunzip2"),
    "xz": (b"\xfd7zXZ\0\0\4", "unxz"),
    "Zstandard": (b"\x28\xb5\x2f\xfd\4\0", "unzstd"),
    "Parquet": (b"PAR1\x15\4", "JSON lines"),
    "Arrow": (b"ARROW1\0\0", "JSON lines"),
    "SQLite": (b"SQLite format 3\0\x10", "JSON lines"),
    "PDF": (b"%PDF-1.7\n", "pdftotext"),
    "tar": (b"a.txt".ljust(257, b"\0") + b"ustar\0", "tar -xf"),
    "UTF-16, marked": (ENGLISH.encode("utf-16"), "iconv -f UTF-16"),
    "UTF-16, little": (ENGLISH.encode("utf-16-le"), "iconv -f UTF-16"),
    "UTF-16, big": (ENGLISH.encode("utf-16-be"), "iconv -f UTF-16"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", ["txt", "jsonl", "json"])
def test_formats_are_named_with_the_remedy(name, ending, tmp_path):
    content, remedy = FORMATS[name]
    content = zipped(tmp_path) if content is None else content
    folder = written(tmp_path / "t", {f"x.{ending}": content})
    texts, report = collected(folder)
    assert texts == [] and len(report.skipped) == 1
    (reason,) = report.skipped
    assert reason.startswith(name.split(",")[0]) and remedy in reason
    config = DataConfig(source="folder", path=str(folder), cache_dir=str(tmp_path / "cache"))
    line = said(lambda: open_corpus(config, tmp_path / "cache", lambda line: None))
    assert "no text to train on (left out: 1 " in line and remedy in line


TEXTS = {
    "text": GOOD,
    "short": b"a",
    "empty": b"",
    "Chinese": "中文文本，没有空格".encode(),
    "a NUL": b"a\0b",
    "NULs": bytes(100),
    "PK as text": b"PK stands for public key",
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_is_no_other_format(case, tmp_path):
    (tmp_path / "x").write_bytes(TEXTS[case])
    assert foreign_format(tmp_path / "x") is None


def test_names_are_told_on_one_line(tmp_path):
    folder = written(tmp_path / "t", {"a\nb\x1b[31m.txt": b"\xff", "good.txt": GOOD})
    os.mkfifo(folder / "pipe")
    _, report = collected(folder)
    lines: list[str] = []
    report.log(lines.append)
    assert all(line.isprintable() for line in lines)
    assert r"a\nb\x1b[31m.txt" in "".join(lines) and report.skipped[why.UNREADABLE].count == 1


# ---- the held-out share --------------------------------------------------------------------------


def prose(seed: int, size: int) -> bytes:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 10_000, size // 5)
    lines = [" ".join(f"{w:04}" for w in words[i : i + 12]) for i in range(0, len(words), 12)]
    return "\n".join(lines).encode()[:size]


def opened(folder: Path, fraction: float, **changes: Any) -> Corpus:
    cache = folder.parent / "cache"
    cache.mkdir(exist_ok=True)
    config = DataConfig(source="folder", path=str(folder), validation_fraction=fraction, **changes)
    return open_corpus(config, cache, lambda line: None)


SHARES = [
    # sizes of the documents, share asked for, most by which it is missed
    ([500_000, 500, 600, 700], 0.02, 0.25),
    ([200_000, 500, 600, 700], 0.1, 0.1),
    ([1_500_000, 90_000, 80_000, 70_000], 0.02, 0.5),
    ([100_000, 100_000, 100_000], 0.05, 0.1),
    ([300_000, 300_000], 0.01, 0.4),
    ([70_000, 100], 0.05, 0.5),
]


@pytest.mark.parametrize(("sizes", "fraction", "most"), SHARES)
def test_a_document_that_is_most_of_the_text_is_on_both_sides(sizes, fraction, most, tmp_path):
    files = {f"{i}.txt": prose(i, size) for i, size in enumerate(sizes)}
    corpus = opened(written(tmp_path / "t", files), fraction)
    report = corpus.report
    share = report.validation_bytes / (report.validation_bytes + report.train_bytes)
    assert abs(share - fraction) <= most * fraction
    assert any("of the text: a part of each is held out" in note for note in report.notes)
    held, train = list(corpus.documents("validation")), list(corpus.documents("train"))
    assert sorted("".join(held + train)) == sorted(b"".join(files.values()).decode())
    assert not set(held) & set(train)
    whole = [content.decode() for content in files.values()]
    assert all(any(text in document for document in whole) for text in held + train)
    again = opened(tmp_path / "t", fraction, cache_dir="x")
    assert again.report.digest == report.digest


def test_documents_of_a_few_kilobytes_are_never_cut(tmp_path):
    """Few and unequal: the share is missed, and a line says so; the documents stay whole."""
    files = {f"{i}.txt": prose(i, size) for i, size in enumerate([60_000, 500, 400, 300])}
    corpus = opened(written(tmp_path / "t", files), 0.02)
    found = {*corpus.documents("validation"), *corpus.documents("train")}
    assert found == {content.decode() for content in files.values()}
    (note,) = corpus.report.notes
    assert "of the text is held out, not the 2.00% that config.data.validation_fraction" in note


def test_which_documents_are_large(tmp_path):
    """More than a tenth of the text, and longer than 64 KiB; of a document in parts, together."""
    spool = Spool(tmp_path / "spool", SourceReport())
    sizes = {0: [101_000], 1: [99_000], 2: [60_000, 50_000], 3: [640_000]}
    for number, parts in sizes.items():
        for part, size in enumerate(parts):
            spool.add("", prose(10 * number + part, size)[:size].ljust(size, b"."), number)
    rest = 1_000_000 - sum(spool.sizes)
    spool.add("", b"." * rest, 4)
    assert rest == 50_000 and len(spool) == 6
    assert large_documents(spool).tolist() == [0, 2, 3]
    spool.close()
    small = Spool(tmp_path / "small", SourceReport())
    for number, size in enumerate([65_536, 65_537, 5]):
        small.add("", bytes([97 + number]) * size, number)
    assert large_documents(small).tolist() == [1]
    small.close()


MISSED = [(2, 98, 0.02, False), (1, 99, 0.02, True), (4, 96, 0.02, True), (0, 9, 0.5, True)]
MISSED += [(14, 986, 0.02, False), (98, 2, 0.02, True), (29, 971, 0.02, False)]


@pytest.mark.parametrize(("held", "train", "fraction", "told"), MISSED)
def test_a_share_that_misses_by_half_is_told(held, train, fraction, told):
    assert bool(missed(held, train, fraction)) == told


# ---- a damaged cache -----------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


CACHES = {
    "a flipped letter": (lambda f: flip(f / "train.txt"), "train.txt: damaged, its CRC-32"),
    "cut off": (lambda f: os.truncate(f / "train.txt", 9), "9 bytes instead of"),
    "not UTF-8": (lambda f: (f / "train.txt").write_bytes(b"\xff" * 60), "is no UTF-8 text"),
    "no text": (lambda f: (f / "train.txt").unlink(), "train.txt: No such file"),
    "no starts": (lambda f: (f / "train.npy").unlink(), "train.npy: No such file"),
    "starts of {": (lambda f: (f / "train.npy").write_text("{"), "no .npy file of numbers"),
    "checksums of {": (lambda f: (f / "crc32.json").write_text("{"), "is no JSON, line 1"),
}


@pytest.mark.parametrize("case", CACHES)
def test_damaged_texts_in_the_cache(case, tmp_path):
    damage, words = CACHES[case]
    spool = Spool(tmp_path / "spool", SourceReport())
    for i in range(4):
        spool.add("x", f"document {i} words".encode()[:15], i)
    text_store.write(spool, np.array([True, False, False, False]), tmp_path)
    spool.close()
    assert len(list(text_store.read(tmp_path, "train"))) == 3
    if case == "not UTF-8":
        (tmp_path / "train.txt").write_bytes(b"x" * 45)
        (tmp_path / "train.txt").write_bytes(b"\xff" * 45)
    else:
        damage(tmp_path)
    line = said(lambda: list(text_store.read(tmp_path, "train")))
    assert words in line and line.endswith(f"; delete {tmp_path} and run again")
