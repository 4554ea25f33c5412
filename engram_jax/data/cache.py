"""The cache of prepared data on disk: every entry is a folder that is complete or absent.

An entry is made in a temporary folder beside its final place and renamed when it is complete, so
that a killed preparation leaves nothing that could be taken for a result. Two processes that want
the same entry wait for each other with a lock file; where locks do not work (some network file
systems) both make it, and the first rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError
from engram_jax.config.given_files import check_folder, local_path
from engram_jax.hardware.storage import cache_folder, replacing, sync_folder, sync_tree


def cache_root(config: DataConfig) -> Path:
    """config.data.cache_dir, else $ENGRAM_CACHE, else ~/.cache/engram_jax; made by what is first
    written there. Raises UserError if it cannot be written."""
    key = "config.data.cache_dir" if config.cache_dir else "$ENGRAM_CACHE"
    local_path(key, config.cache_dir or os.environ.get("ENGRAM_CACHE", ""))
    root = cache_folder(config.cache_dir)
    try:
        check_folder(root)
    except OSError as error:
        raise UserError(
            f"cache folder {root}: cannot be written ({error.strerror}); "
            "set config.data.cache_dir or $ENGRAM_CACHE to a folder that can"
        ) from error
    return root


def key_of(*parts: Any) -> str:
    """A name for a cache entry: 32 hex digits of the SHA-256 of the parts as JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_once(
    entry: Path, make: Callable[[Path], None], valid: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """The folder `entry`, filled by `make(temporary folder)` unless it exists and is `valid`.
    Raises UserError if the disk is full. If `make` fails, nothing is left, also of folders around
    the entry that were made for it."""
    if valid(entry):
        return entry
    with _lock(entry.with_name(entry.name + ".lock")) as locked:
        if valid(entry):
            return entry
        shutil.rmtree(entry, ignore_errors=True)
        if locked:  # no other process is making it: partial folders are from killed ones
            for stale in entry.parent.glob(f"{entry.name}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
        partial = entry.with_name(f"{entry.name}.partial-{uuid.uuid4().hex[:12]}")
        partial.mkdir()
        try:
            make(partial)
            sync_tree(partial)
            _rename(partial, entry)
            sync_folder(entry.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"cache folder {entry.parent}: {os.strerror(error.errno)}; make room, or set "
                "config.data.cache_dir or $ENGRAM_CACHE to another folder"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return entry


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically. Several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """The value in `path`, or None if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _rename(partial: Path, entry: Path) -> None:
    try:
        os.rename(partial, entry)
    except OSError:
        if not entry.is_dir():  # otherwise another process was first, with the same content
            raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold `path` exclusively; yields False where the file system has no locks. What fails inside
    takes the file along, and the folders that were made for it, if they are empty."""
    made: list[Path] = []
    file, locked = _open_locked(path, made)
    with file:  # closing it, or the process's death, frees the lock
        try:
            yield locked
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
                for folder in made:
                    folder.rmdir()
            raise


def _open_locked(path: Path, made: list[Path]) -> tuple[TextIO, bool]:
    """The open file, and whether it is locked. made: gets the folders that are made, the innermost
    first."""
    while True:
        made += [folder for folder in path.parents if not folder.exists() and folder not in made]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # another process has failed, and removed the folder again
            if path.parent.is_dir():
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file, False
        if _is_at(path, file):  # else a process that failed has removed it meanwhile
            return file, True
        file.close()


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
