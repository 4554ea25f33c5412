"""The cache folder on this machine, and atomic file writes."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder(given: str = "") -> Path:
    """`given`, or if empty $ENGRAM_CACHE, or ~/.cache/engram_jax; absolute. Nothing is made."""
    name = given or os.environ.get("ENGRAM_CACHE") or "~/.cache/engram_jax"
    return Path(name).expanduser().absolute()


_LOCKED_WITHIN = 60.0  # seconds


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = True) -> Iterator[BinaryIO]:
    """A new file to read and write, which becomes `path` at the end, flushed to the disk.

    On any exception, `path` stays as it was and nothing is left beside it; a process that is killed
    leaves PATH.partial. shared: others may be writing the same path at the same time; what a killed
    one leaves is then PATH.xxxxxxxx.partial, and removed by the next to write the path.
    """
    if shared:
        _remove_leavings(path)
    unique = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f"{path.name}{unique}.partial")
    try:
        with open(partial, "x+b" if shared else "w+b") as file:
            if shared:
                _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial), partial):
            error.filename, error.filename2 = str(path), None  # of writing: Python names no file
        raise
    sync_folder(path.parent)


def _remove_leavings(path: Path) -> None:
    """Remove the partial files that killed processes left of `path`: those that nobody has locked,
    and that have been there for longer than it takes to lock one."""
    for name in glob.glob(f"{glob.escape(str(path))}.????????.partial"):
        with contextlib.suppress(OSError), open(name, "r+b") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _LOCKED_WITHIN:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name)


def _lock(file: BinaryIO) -> None:
    """Mark a file as being written; where the file system has no locks, nothing is marked, and
    nothing can be removed."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; some network file systems cannot."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sync_tree(folder: Path) -> None:
    """Flush everything below a folder to the disk, before the folder gets its final name."""
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(path))


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8. One process at a time."""
    with replacing(path, shared=False) as file:
        file.write(text.encode())
