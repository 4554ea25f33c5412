"""Sources as a whole: what is refused, what is counted, what is cached, and who is held out."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engram_jax.config.errors import UserError
from engram_jax.data import cache, text_store
from engram_jax.data import corpus as corpora
from engram_jax.data import source_report as why
from engram_jax.data.cache import build_once, cache_root
from engram_jax.data.corpus import Corpus, open_corpus


def quiet(line: str) -> None:
    del line


def open_folder(config) -> Corpus:
    return open_corpus(config.data, cache_root(config.data), quiet)


def both(corpus: Corpus) -> tuple[set[str], set[str]]:
    return set(corpus.documents("train")), set(corpus.documents("validation"))


def test_every_document_is_on_exactly_one_side(tmp_path, make_config, helpers):
    texts = helpers.write_folder(tmp_path / "text", 60)
    corpus = open_folder(make_config(tmp_path / "text"))
    train, valid = both(corpus)
    assert not train & valid
    assert train | valid == set(texts.values())
    assert 0 < len(valid) < 30
    report = corpus.report
    assert (report.train_documents, report.validation_documents) == (len(train), len(valid))
    assert report.train_bytes == sum(len(text.encode()) for text in train)
    assert report.validation_bytes == sum(len(text.encode()) for text in valid)


def test_content_decides_not_names_or_positions(tmp_path, make_config, helpers):
    texts = helpers.write_folder(tmp_path / "a", 40)
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for i, text in enumerate(reversed(texts.values())):
        (tmp_path / "b" / "deep" / f"other{i}.md").write_text(text)
    a = open_folder(make_config(tmp_path / "a"))
    b = open_folder(make_config(tmp_path / "b"))
    assert a.report.digest == b.report.digest
    assert list(a.documents("train")) == list(b.documents("train"))
    (tmp_path / "b" / "one_more.txt").write_text("a new document")
    c = open_folder(make_config(tmp_path / "b"))
    assert c.report.digest != b.report.digest
    assert both(b)[0] <= both(c)[0]
    assert both(b)[1] <= both(c)[1]


def test_mixed_folder_is_counted(tmp_path, make_config, helpers, write_json_lines):
    folder = tmp_path / "text"
    texts = set(helpers.write_folder(folder, 20).values())
    write_json_lines(folder / "sub" / "x.jsonl", [{"text": f"json {i} text"} for i in range(10)])
    (folder / "module.py").write_text("def f():\n    return 1\n")
    (folder / "empty.txt").write_text("")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "copy.txt").write_text((folder / "d000.txt").read_text())
    (folder / ".hidden").write_text("not read")
    (folder / "broken_link").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    corpus = open_folder(make_config(folder))
    train, valid = both(corpus)
    expected = texts | {f"json {i} text" for i in range(10)} | {"def f():\n    return 1\n"}
    assert train | valid == expected
    counts = {reason: tally.count for reason, tally in corpus.report.skipped.items()}
    assert counts == {
        why.EMPTY: 1,
        why.BINARY: 1,
        why.NOT_UTF8: 1,
        why.DUPLICATE: 1,
        why.HIDDEN: 1,
        why.UNREADABLE: 2,
    }


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_names_that_are_not_utf8_can_be_printed(tmp_path, make_config, helpers):
    folder = tmp_path / "te\udcffxt"
    texts = helpers.write_folder(folder, 20)
    (folder / "d\udcfe.txt").write_text("a name that is not UTF-8")
    (folder / "e\udcfd.txt").write_bytes(b"\0")
    lines: list[str] = []
    config = make_config(folder)
    corpus = open_corpus(config.data, cache_root(config.data), lines.append)
    corpus.report.log(lines.append)
    assert set().union(*both(corpus)) == {*texts.values(), "a name that is not UTF-8"}
    printed = "\n".join(lines).encode()  # as a terminal does
    assert rb"e\udcfd.txt" in printed and rb"te\udcffxt" in printed


def test_missing_folder(tmp_path, make_config):
    with pytest.raises(UserError, match=r"config.data.path = .*nowhere.*no such folder"):
        open_folder(make_config(tmp_path / "nowhere"))


def test_no_text_at_all(tmp_path, make_config):
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match="no text to train on"):
        open_folder(make_config(tmp_path / "text"))
    (tmp_path / "text" / "blank.txt").write_text("  \n")
    (tmp_path / "text" / "bin").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=r"no text to train on \(left out: 1 .*, 1 "):
        open_folder(make_config(tmp_path / "text"))
    # a failure leaves nothing behind that a later run would take for a result
    assert not (tmp_path / "cache").exists()


def test_text_key_missing_everywhere(tmp_path, make_config, write_json_lines):
    write_json_lines(tmp_path / "t" / "a.jsonl", [{"content": "x", "id": i} for i in range(5)])
    with pytest.raises(UserError, match=r"text_key = 'text'.*content, id"):
        open_folder(make_config(tmp_path / "t"))


def test_text_key_is_used(tmp_path, make_config, write_json_lines):
    records = [{"content": f"text number {i}"} for i in range(30)]
    write_json_lines(tmp_path / "t" / "a.jsonl", records)
    train, valid = both(open_folder(make_config(tmp_path / "t", text_key="content")))
    assert train | valid == {record["content"] for record in records}


def test_unwritable_cache(tmp_path, make_config):
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be written"):
        cache_root(config.data)


def test_cache_folder_choice(tmp_path, make_config, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "env"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = make_config(tmp_path)
    assert cache_root(config.data) == tmp_path / "cache"
    unset = dataclasses.replace(config.data, cache_dir="")
    assert cache_root(unset) == tmp_path / "env"
    monkeypatch.delenv("ENGRAM_CACHE")
    assert cache_root(unset) == tmp_path / "home" / ".cache" / "engram_jax"
    assert list(tmp_path.iterdir()) == []  # nothing is made before there is something to keep


def test_single_file_is_cut_so_that_some_is_held_out(tmp_path, make_config, helpers):
    text = helpers.words(3, 3000)
    (tmp_path / "book.txt").write_text(text)
    config = make_config(tmp_path / "book.txt", validation_fraction=0.1)
    corpus = open_folder(config)
    train, valid = both(corpus)
    assert train
    assert valid
    assert sum(map(len, train)) + sum(map(len, valid)) == len(text)
    assert any("only one document" in note for note in corpus.report.notes)


def test_single_tiny_file_is_refused(tmp_path, make_config):
    (tmp_path / "book.txt").write_text("too little")
    with pytest.raises(UserError, match="too little"):
        open_folder(make_config(tmp_path / "book.txt"))


def test_max_megabytes_limits_a_folder_and_says_so(tmp_path, make_config):
    (tmp_path / "t").mkdir()
    for i in range(30):
        (tmp_path / "t" / f"{i}.txt").write_text(f"{i} " * 25_000)
    corpus = open_folder(make_config(tmp_path / "t", max_megabytes=1))
    kept = corpus.report.train_bytes + corpus.report.validation_bytes
    assert 900_000 < kept <= 1_000_000
    tally = corpus.report.skipped[why.OVER_LIMIT]
    sizes = sum(p.stat().st_size for p in (tmp_path / "t").iterdir())
    assert kept + tally.bytes == sizes


def test_prepared_once_and_again_when_a_file_changes(tmp_path, make_config, helpers, monkeypatch):
    helpers.write_folder(tmp_path / "text", 30)
    config = make_config(tmp_path / "text")
    first = open_folder(config)

    def fail(*args):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(text_store, "write", fail)
        patch.setattr(corpora, "Spool", fail)
        second = open_folder(config)
    assert second.report.digest == first.report.digest
    assert second.report == first.report

    (tmp_path / "text" / "d000.txt").write_text("changed")
    third = open_folder(config)
    assert third.report.digest != first.report.digest
    assert "changed" in both(third)[0] | both(third)[1]


def test_lost_dataset_is_made_again(tmp_path, make_config, helpers):
    helpers.write_folder(tmp_path / "text", 30)
    config = make_config(tmp_path / "text")
    first = open_folder(config)
    documents = list(first.documents("train"))
    shutil.rmtree(tmp_path / "cache" / "texts")
    assert list(open_folder(config).documents("train")) == documents


def test_text_that_was_cut_off_in_the_cache_is_refused(tmp_path, make_config, helpers):
    helpers.write_folder(tmp_path / "text", 30)
    corpus = open_folder(make_config(tmp_path / "text"))
    (path,) = (tmp_path / "cache" / "texts").glob("*/train.txt")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}: .* bytes instead of .*; delete {path.parent}"):
        list(corpus.documents("train"))


# Interrupted and simultaneous preparation.


SLOW_PREPARATION = """
import importlib.util, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("cache", sys.argv[1])  # without the package: quick
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)

def make(folder):
    (folder / "half").write_text("half")
    Path(sys.argv[3]).touch()
    time.sleep(float(sys.argv[4]))
    (folder / "whole").write_text("whole")

cache.build_once(Path(sys.argv[2]), make)
"""


def prepare_slowly(entry: Path, seconds: float) -> subprocess.Popen:
    """Another process that is in the middle of making `entry` when this returns."""
    started = entry.with_name("started")
    arguments = [cache.__file__, str(entry), str(started), str(seconds)]
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARATION, *arguments])
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    started.unlink()
    return process


def test_killed_preparation_leaves_nothing_valid(tmp_path):
    entry = tmp_path / "entry"
    process = prepare_slowly(entry, 60)
    process.kill()
    process.wait()
    assert not entry.exists()
    assert len(list(tmp_path.glob("entry.partial-*"))) == 1

    made = build_once(entry, lambda folder: (folder / "whole").touch())
    assert [p.name for p in made.iterdir()] == ["whole"]
    assert not list(tmp_path.glob("entry.partial-*"))  # the killed one's is cleared away


def test_failed_preparation_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_once(tmp_path / "entry", fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="disk full"):
        build_once(tmp_path / "made" / "for" / "entry", fail)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_users_error(tmp_path):
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(UserError, match=f"cache folder {tmp_path}: No space left on device"):
        build_once(tmp_path / "entry", fail)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_prepare_one_entry_once(tmp_path):
    process = prepare_slowly(tmp_path / "entry", 0.5)

    def never(folder: Path) -> None:
        raise AssertionError("made twice")

    entry = build_once(tmp_path / "entry", never)  # waits for the other process
    assert sorted(p.name for p in entry.iterdir()) == ["half", "whole"]
    assert process.wait() == 0


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError("not supported")

    monkeypatch.setattr("engram_jax.data.cache.fcntl.flock", no_locks)
    entry = tmp_path / "entry"

    def make(folder: Path) -> None:
        (folder / "mine").touch()
        entry.mkdir()  # another process finishes meanwhile
        (entry / "theirs").touch()

    assert [p.name for p in build_once(entry, make).iterdir()] == ["theirs"]
    assert not list(tmp_path.glob("entry.partial-*"))
