"""Floor 0: loops compiled by numba, for what NumPy does too slowly on the host.

The machine code is kept on disk. numba itself renews it when the file of a function changes, but
not when a compiled function that this one calls does; so it is kept under a name that all files of
the function's folder decide.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba

from engram_jax.hardware import storage


def host_jit(function: Callable) -> Any:
    """Compile a function without the interpreter's lock, so that threads run at once.

    A division by zero gives what C gives. Functions that it calls must be of the same folder, or
    numba's own.
    """
    settings: Any = numba.config
    before = settings.CACHE_DIR
    found = machine_code_folder(Path(function.__code__.co_filename).parent)
    try:
        if found:
            settings.CACHE_DIR = found  # read while the next line runs, and only then
        return numba.njit(nogil=True, cache=bool(found), error_model="numpy")(function)
    finally:
        settings.CACHE_DIR = before


@lru_cache
def machine_code_folder(sources: Path) -> str:
    """Where machine code of a folder's functions is kept: below $ENGRAM_CACHE, else
    ~/.cache/engram_jax. "" = nothing can be written there; it is compiled anew by every process."""
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*.py"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = storage.cache_folder() / "native" / digest.hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""
