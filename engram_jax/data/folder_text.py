"""The source "folder": text files or JSON records (.jsonl, .ndjson, .json) below a path, or one."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import local_path
from engram_jax.data import source_report as why
from engram_jax.data.documents import Spool, add_file, foreign_format
from engram_jax.data.json_text import add_json, add_json_lines
from engram_jax.data.source_report import SourceReport

JSON_LINES, JSON = (".jsonl", ".ndjson"), ".json"


@dataclass(frozen=True)
class File:
    """A file as it was when the folder was listed; `name` is its path below the root."""

    path: Path
    name: str
    size: int
    mtime_ns: int


class FolderText:
    """Every readable file below config.data.path, in an order that does not depend on the machine.
    Raises UserError if there is no such path."""

    def __init__(self, config: DataConfig, report: SourceReport) -> None:
        self._config = config
        root = local_path("config.data.path", config.path).absolute()
        if not root.exists():
            raise UserError(f"config.data.path = {config.path!r}: no such folder or file")
        self._root = root
        if root.is_dir():
            files = list_files(root, report)
        else:
            files = [f for f in [stat_file(root, root.name, report)] if f is not None]
        self.files = in_hash_order(files)

    def manifest(self) -> list[Any]:
        """JSON values that change when a file changes, made without reading any."""
        files = [[f.name, f.size, f.mtime_ns] for f in self.files]
        return ["folder", str(self._root), self._config.text_key, files]

    def collect(self, spool: Spool) -> None:
        """Add every document to the spool. Raises UserError if most of the text is in JSON lines
        without the text key, or there is no other; a few of them are counted."""
        max_bytes, text_key = self._config.max_document_bytes, self._config.text_key
        origin, other_keys, without_key = 0, Counter[str](), 0
        for file in self.files:
            if spool.full:
                spool.report.skip(why.OVER_LIMIT, file.name, file.size)
                continue
            try:
                ending = file.path.suffix.lower()
                if reason := foreign_format(file.path):
                    spool.report.skip(reason, file.name, file.size)
                elif ending == JSON or ending in JSON_LINES:
                    add = add_json if ending == JSON else add_json_lines
                    before = spool.report.bytes_of(why.NO_KEY)
                    origin, keys = add(spool, file.path, file.name, origin, text_key, max_bytes)
                    other_keys += keys
                    if ending in JSON_LINES:  # a .json file may be anything beside the text
                        without_key += spool.report.bytes_of(why.NO_KEY) - before
                else:
                    add_file(spool, file.path, file.name, origin, max_bytes)
                    origin += 1
            except OSError:
                spool.report.skip(why.UNREADABLE, file.name, file.size)
        if not other_keys:
            return
        found = shown(", ".join(sorted(key for key, _ in other_keys.most_common(8))), quoted=False)
        if not len(spool) or without_key > spool.bytes:
            which = "most of the text is in JSON lines without" if len(spool) else "nothing has"
            raise UserError(
                f"config.data.text_key = {text_key!r}: {which} that key, below"
                f" {shown(self._root)}; the records have {found}"
            )
        spool.report.notes.append(
            f"the JSON records without the key {text_key!r} (config.data.text_key) have {found}"
        )


def list_files(root: Path, report: SourceReport) -> list[File]:
    """Regular files below `root`, links followed once; hidden and unreadable ones are counted."""
    files: list[File] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        report.skip(why.UNREADABLE, os.path.relpath(error.filename or "?", root), 0)

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:  # a link back into the tree
            folders.clear()
            continue
        seen.add(real)
        for name in [n for n in (*folders, *names) if n.startswith(".")]:
            report.skip(why.HIDDEN, os.path.relpath(os.path.join(folder, name), root), 0)
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            path = Path(folder, name)
            if file := stat_file(path, path.relative_to(root).as_posix(), report):
                files.append(file)
    return files


def stat_file(path: Path, name: str, report: SourceReport) -> File | None:
    """`path` as a File, or None (counted) if it is not a regular file or cannot be accessed."""
    try:
        status = path.stat()
    except OSError:
        report.skip(why.UNREADABLE, name, 0)
        return None
    if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
        report.skip(why.UNREADABLE, name, 0)
        return None
    return File(path, name, status.st_size, status.st_mtime_ns)


def in_hash_order(files: Iterable[File]) -> list[File]:
    """Ordered by a hash of the name, so that any prefix of the list is a fair sample of it."""
    return sorted(files, key=lambda f: hashlib.sha256(f.name.encode(errors="replace")).digest())
