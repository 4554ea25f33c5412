"""What one checkpoint directory holds, and whether it is still what was written.

Tensorstore notices a missing or truncated file only where a value is read from the missing part,
and a flipped bit in an array not at all. So sizes and CRC-32 are written down with the files.
"""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from engram_jax.errors import UserError

FORMAT = 1
_LIST = "files.json"
_CHUNK = 1 << 24

IteratorState = bytes | dict[str, Any] | None


class StateHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler for trees of arrays, which also lists what it has written in files.json."""

    def finalize(self, directory: epath.Path) -> None:
        """Called by one process, when all have written and before the checkpoint is visible."""
        super().finalize(directory)
        contents = jax.process_count() == 1  # else one process would have to read what all wrote
        files = {}
        for path in _walk(directory):
            crc = _crc_of_file(path) if contents else None
            files[str(path.relative_to(directory))] = [path.stat().length, crc]
        (directory / _LIST).write_text(json.dumps(files))


def check_arrays(path: epath.Path, *, contents: bool) -> None:
    """Compare the files of `path`/state with their list: sizes always, CRCs if `contents`.

    Raises UserError naming the file and what is wrong with it (the caller names the checkpoint).
    """
    directory = path / "state"
    try:
        listed = json.loads((directory / _LIST).read_text())
        expected = {name: (int(size), crc) for name, (size, crc) in listed.items()}
    except OSError as error:
        raise UserError(f"state/{_LIST} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"state/{_LIST} is damaged") from error
    for name, (size, crc) in expected.items():
        file = directory / name
        if not file.exists():
            raise UserError(f"state/{name} is missing")
        if (found := file.stat().length) != size:
            raise UserError(f"state/{name} has {found} bytes of {size}")
        if contents and crc is not None and _crc_of_file(file) != crc:
            raise UserError(f"state/{name} was altered after it was written")


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """What meta/metadata holds: a deep copy of the content (JSON values) and its CRC-32."""
    copy = json.loads(json.dumps(content))
    return {"content": copy, "crc32": _crc_of_json(copy)}


def read_meta(path: epath.Path) -> dict[str, Any]:
    """The content of `path`/meta/metadata.

    Raises UserError, without naming the checkpoint, if it is not what was written.
    """
    file = path / "meta" / "metadata"
    if not file.exists():
        raise UserError("meta/metadata is missing; it is no checkpoint of this project")
    try:
        stored = json.loads(file.read_text())
        content, crc, version = stored["content"], stored["crc32"], stored["content"]["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("meta/metadata is damaged, or of another project") from error
    if crc != _crc_of_json(content):
        raise UserError("meta/metadata was altered after it was written")
    if version != FORMAT:
        raise UserError(f"has format {version}; this version reads {FORMAT}")
    return content


def compare(content: dict[str, Any], wanted: dict[str, Any], fingerprint: str | None) -> None:
    """Raise UserError unless `content` (of `read_meta`) describes the state that is wanted.

    wanted: arrays or shapes by path. fingerprint: of the run's addressing, None without memory.
    """
    there, here = content["addressing"], fingerprint
    if there != here:
        raise UserError(
            f"was trained under addressing {there or 'none'}, this run has {here or 'none'}"
        )
    if len(content["iterators"]) != jax.process_count():
        raise UserError(
            f"was written by {len(content['iterators'])} processes, this run has"
            f" {jax.process_count()}; their data iterators cannot be divided anew"
        )
    theirs = {name: f"{dtype}{shape}" for name, (shape, dtype) in content["arrays"].items()}
    ours = {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in wanted.items()}
    names = [*ours, *(name for name in theirs if name not in ours)]
    different = [name for name in names if theirs.get(name) != ours.get(name)]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more arrays)" if different[1:] else ""
        raise UserError(
            f"belongs to another model: {name} is {theirs.get(name, 'absent')} there and"
            f" {ours.get(name, 'absent')} here{more}"
        )


def gather_iterators(state: IteratorState) -> list[dict[str, Any]]:
    """The iterator states of all processes, in their order, as JSON values."""
    mine: dict[str, Any] = {"json": state}
    if isinstance(state, bytes):
        mine = {"bytes": base64.b64encode(state).decode()}
    if jax.process_count() == 1:
        return [mine]
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def decode_iterator(stored: dict[str, Any]) -> IteratorState:
    return base64.b64decode(stored["bytes"]) if "bytes" in stored else stored["json"]


class OneLine:
    """Context: whatever Orbax raises becomes one line for the user, its cause attached."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = ": ".join([type(error).__name__, *lines[:1]])
            raise UserError(f"{self._what} ({reason[:300]})") from error


class _OrbaxTracebacks(logging.Filter):
    """Drops the tracebacks that Orbax logs of exceptions it also raises."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


TRACEBACKS = _OrbaxTracebacks()


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    """All files below; epath has no recursive glob."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _crc_of_file(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
