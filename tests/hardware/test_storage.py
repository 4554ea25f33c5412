"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from engram_jax.hardware.storage import cache_folder, replacing, write_text


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_at_the_end(tmp_path, shared):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, shared=shared) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, shared):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with replacing(path, shared=shared) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / "file.partial").write_text("much longer than what comes")
    write_text(tmp_path / "file", "é")
    assert (tmp_path / "file").read_bytes() == "é".encode() and os.listdir(tmp_path) == ["file"]


def test_file_and_folder_are_flushed_where_the_file_system_can(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def only_files(descriptor):
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if flushed[-1]:
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_text(tmp_path / "file", "new")
    assert flushed == [False, True] and (tmp_path / "file").read_text() == "new"


def test_a_disk_that_cannot_flush_the_file_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_which_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "variable"))
    assert cache_folder(str(tmp_path / "given")) == tmp_path / "given"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("ENGRAM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "engram_jax"
    assert not list(tmp_path.iterdir())
