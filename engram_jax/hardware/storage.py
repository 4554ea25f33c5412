"""The cache folder on this machine, and atomic file writes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder(given: str = "") -> Path:
    """`given`, or if empty $ENGRAM_CACHE, or ~/.cache/engram_jax; absolute. Nothing is made."""
    name = given or os.environ.get("ENGRAM_CACHE") or "~/.cache/engram_jax"
    return Path(name).expanduser().absolute()


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = True) -> Iterator[BinaryIO]:
    """A new file to read and write, which becomes `path` at the end, flushed to the disk.

    On any exception, `path` stays as it was and nothing is left beside it; a process that is killed
    leaves PATH.partial. shared: others may be writing the same path at the same time; what a killed
    one leaves is then PATH.xxxxxxxx.partial.
    """
    unique = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f"{path.name}{unique}.partial")
    try:
        with open(partial, "x+b" if shared else "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name, too; some network file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8. One process at a time."""
    with replacing(path, shared=False) as file:
        file.write(text.encode())
