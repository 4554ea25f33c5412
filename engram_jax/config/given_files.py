"""Files that a user names: opened and read, or refused in one line that is safe to print."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config.errors import UserError, shown

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_MOST_JSON = 1 << 28  # bytes; the records that are read whole are a thousandth of it


def open_file(path: str | Path, what: str = "") -> FileIO:
    """The regular file `path`, open to read. It never waits, as opening a FIFO does.

    what: put before the path in messages ("tokenizer"). Raises UserError for anything else:
    missing, not readable, a folder, a FIFO, a device, a loop of links, a name that cannot be one.
    """
    name = f"{what} {shown(path)}".strip()
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{name}: {reason_of(error)}") from error
    except ValueError as error:  # a NUL byte
        raise UserError(f"{name}: no possible name of a file") from error
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        kind = next((kind for test, kind in _KINDS if test(mode)), "something else")
        raise UserError(f"{name}: is {kind}, must be a file")
    file = FileIO(number, "rb")
    file.name = os.fspath(path)
    return file


def read_text(path: str | Path, what: str = "") -> str:
    """The file as text. Raises UserError as `open_file`, and for what is not UTF-8 or too long."""
    with open_file(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_JSON:
            raise UserError(f"{what} {shown(path)}: {size:,} bytes, too long".strip())
        try:
            return file.readall().decode()
        except OSError as error:
            raise UserError(f"{what} {shown(path)}: {reason_of(error)}".strip()) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{what} {shown(path)}: is no UTF-8 text".strip()) from error


def read_json(path: str | Path, what: str = "", kind: type = dict) -> Any:
    """The JSON value in the file, an object unless `kind` says otherwise.

    Raises UserError as `read_text`, and for other content.
    """
    name = f"{what} {shown(path)}".strip()
    text = read_text(path, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        detail = "is empty" if not text.strip() else f"is no JSON{where}"
        raise UserError(f"{name}: {detail}; it is damaged, or of another program") from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise UserError(f"{name}: holds no JSON {wanted}; it is damaged, or of another program")
    return value


@contextlib.contextmanager
def open_arrays(path: str | Path, what: str = "") -> Iterator[dict[str, np.ndarray]]:
    """The arrays of an .npz file by name; one of Python objects is refused, never unpickled.

    What the body raises as it takes the arrays apart (KeyError, ValueError, TypeError ...) becomes
    one line, too. Raises UserError.
    """
    name = f"{what} {shown(path)}".strip()
    with open_file(path, what) as raw:
        try:
            if not zipfile.is_zipfile(raw):
                size = os.fstat(raw.fileno()).st_size
                raise UserError(f"{name}: no .npz file, or truncated ({size:,} bytes)")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as archive:
                yield _Arrays(archive)
        except UserError:
            raise
        except Exception as error:  # whatever a truncated or foreign file raises
            raise UserError(f"{name}: {reason_of(error)}") from error


class _Arrays(dict[str, np.ndarray]):
    """Reads an array when it is asked for."""

    def __init__(self, archive: Any) -> None:
        super().__init__(dict.fromkeys(archive.files))
        self._archive = archive

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(name)
        try:
            found = self._archive[name]
        except ValueError as error:  # NumPy advises to unpickle it
            raise ValueError(f"array {shown(name)} is damaged, or not of numbers") from error
        if not isinstance(found, np.ndarray):
            raise ValueError(f"{shown(name)} is no array")
        return found


def load_array(path: str | Path, what: str = "") -> np.ndarray:
    """The array of an .npy file. Raises UserError; Python objects are refused, never unpickled."""
    name = f"{what} {shown(path)}".strip()
    with open_file(path, what) as raw:
        try:
            return np.lib.format.read_array(raw, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError, OverflowError) as error:
            raise UserError(f"{name}: no .npy file of numbers, or damaged") from error


def local_path(key: str, value: str) -> Path:
    """A path that a flag or a key gives, `~` and `~user` expanded. Raises UserError for one of a
    remote store (gs://bucket/run), which would become a folder of that name here."""
    if _REMOTE.match(value):
        raise UserError(
            f"{key}={shown(value)}: must be a path of this machine's file system; a bucket can be"
            " mounted (gcsfuse, s3fs), or copied to"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"{key}={shown(value)}: {error}") from error


def check_output(flag: str, value: str | Path) -> None:
    """Raises UserError unless the file that a flag names can be written: before hours of work.

    Nothing is left behind. The folder must be there.
    """
    path = Path(value)
    where = f"--{flag}={shown(value)}"
    try:
        if path.is_dir():
            raise UserError(f"{where}: is a folder, must be the name of a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: is no file that could be replaced")
        if not path.parent.is_dir():
            raise UserError(f"{where}: {shown(path.parent)} is no folder; make it first")
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        partial.touch(exist_ok=False)  # tells of a name that is too long
        partial.unlink()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: cannot be written: {reason_of(error)}") from error
    except ValueError as error:
        raise UserError(f"{where}: no possible name of a file") from error


def check_folder(path: Path) -> None:
    """Raises OSError unless `path` is, or can become, a folder to write to. Nothing is made, so
    that what is refused later leaves no empty folder behind."""
    folder = path.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder))
    with tempfile.TemporaryFile(dir=folder):
        pass


def reason_of(error: BaseException) -> str:
    """Why a file could not be used, in a few words that are safe to print."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"lacks {shown(error.args[0])}"
    if isinstance(error, zipfile.BadZipFile | EOFError):
        return "truncated or damaged"
    text = str(error)
    if not text or "pickle" in text:
        return f"not what was expected ({type(error).__name__})"
    return shown(text.splitlines()[0], quoted=False)
