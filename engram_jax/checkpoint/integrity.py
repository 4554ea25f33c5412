"""Checksums of a checkpoint's files (sizes, CRC-32): written with it, verified before use.

Tensorstore notices a missing or truncated file only where a value is read from the missing part,
and a flipped bit in an array not at all. So sizes and CRC-32 are written down with the files.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import heapq
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from engram_jax.addressing.artifact import Addressing, check_same
from engram_jax.config.errors import UserError, shown
from engram_jax.distributed.consensus import gather

FORMAT = 1
_LIST = "files.json"
_LIST_OF = "files.{}.json"  # of one process, until the checkpoint is complete
_CHUNK = 1 << 24
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_FULL = os.strerror(errno.ENOSPC)

IteratorState = bytes | dict[str, Any] | None


def list_mine(directory: epath.Path, own: Callable[[str], bool]) -> None:
    """Size and CRC of what this process has written: it can read that while others still write.

    own: whether a folder, by its name, is this process's.
    """
    me = jax.process_index()
    files = {}
    for part in sorted(directory.iterdir()):
        if part.is_dir() and own(part.name):
            files.update({_name(path, directory): _size_and_crc(path) for path in _walk(part)})
    (directory / _LIST_OF.format(me)).write_text(json.dumps(files))


def list_all(directory: epath.Path) -> None:
    """One list out of those of all processes and the few files that none of them has listed."""
    files: dict[str, Any] = {}
    for rank in range(jax.process_count()):
        part = directory / _LIST_OF.format(rank)
        files.update(json.loads(part.read_text()))
        part.unlink()
    for path in _walk(directory):
        if _name(path, directory) not in files:
            files[_name(path, directory)] = _size_and_crc(path)
    (directory / _LIST).write_text(json.dumps(files))


def absolute(path: epath.PathLike) -> epath.Path:
    """Orbax writes to absolute paths only; one with a scheme (gs://bucket/run) is."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def settle_addressing(directory: epath.Path, mine: Addressing, begun: bool, *, write: bool) -> None:
    """What an earlier launch stored binds this one once there are tables, in a checkpoint."""
    if begun and (directory / "addressing.json").exists():
        check_same(Addressing.load(directory), mine)
    elif write:
        if jax.process_index() == 0:
            mine.save(directory)
    elif begun:
        raise UserError(f"workdir {directory.parent}: holds no addressing/ for its tables")


def check_arrays(path: epath.Path, *, share: bool) -> None:
    """Compare the files of `path`/state with their list.

    share: this process's share of the files, and their contents (every process calls it, see
      `distributed.consensus.agree`); else the sizes of all.

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
    mine = _share({name: size for name, (size, _) in expected.items()}) if share else expected
    for name, (size, crc) in expected.items():
        if name not in mine:
            continue
        file = directory / name
        if not file.exists():
            raise UserError(f"state/{name} is missing")
        if (found := file.stat().length) != size:
            raise UserError(f"state/{name} has {found} bytes of {size}")
        if share and crc is not None and _crc_of_file(file) != crc:
            raise UserError(f"state/{name} was altered after it was written")


def digest(path: epath.Path, content: dict[str, Any]) -> str:
    """What a checkpoint is known by: SHA-256 (hex) of its `content` (of `read_meta`) and of the
    sizes and CRC-32s of the files of `path`/state, which `check_arrays` has compared with them.

    A copy has the same; every save has another, of the same numbers, too (Orbax writes the time
    into its files). So it is of one save on one mesh, and takes no second look at the arrays.
    """
    listed = json.loads((path / "state" / _LIST).read_text())
    return hashlib.sha256(json.dumps([content, listed], sort_keys=True).encode()).hexdigest()


def _share(sizes: dict[str, int]) -> set[str]:
    """The files that this process reads; each is read by one, and all read about as much."""
    loads = [(0, rank) for rank in range(jax.process_count())]
    mine = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], rank))
        if rank == jax.process_index():
            mine.add(name)
    return mine


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


def check_step(content: dict[str, Any], step: int) -> None:
    """Raises UserError if the checkpoint was written after another step than its folder's name
    says: rates, data and random numbers would be those of that step."""
    if content["step"] != step:
        raise UserError(
            f"was written after step {content['step']}; its folder was renamed: call it"
            f" {content['step']} again"
        )


def loss_in(content: dict[str, Any]) -> float:
    """The "loss" of a checkpoint's content; infinite without one."""
    loss = content["metrics"].get("loss")
    return math.inf if loss is None else loss


def loss_of(path: epath.PathLike) -> float:
    """`loss_in` of the checkpoint at `path`; infinite if it cannot be read."""
    try:
        return loss_in(read_meta(epath.Path(path)))
    except UserError:
        return math.inf


def lowest(losses: Mapping[int, float]) -> int | None:
    """The step of the lowest loss, the first of equals; None if no step has a finite one."""
    step = min(sorted(losses), key=losses.__getitem__, default=None)
    return None if step is None or losses[step] == math.inf else step


def compare(
    content: dict[str, Any],
    wanted: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    fingerprint: str | None,
    whole: bool = True,
) -> None:
    """Raise UserError unless `content` (of `read_meta`) describes the state that is wanted.

    wanted: arrays or abstract ones by path; shapes: theirs, without padding.
    fingerprint: of the run's addressing, None without memory.
    whole: no array may be there that is not wanted.
    """
    there, here = content["addressing"], fingerprint
    if there != here:
        raise UserError(
            f"was trained under addressing {there or 'none'}, this run has {here or 'none'}"
        )
    if len(content["iterators"]) not in (1, jax.process_count()):
        raise UserError(
            f"was written by {len(content['iterators'])} processes, this run has"
            f" {jax.process_count()}; their data iterators cannot be divided anew"
        )
    theirs = {name: f"{dtype}{shape}" for name, (shape, dtype) in content["arrays"].items()}
    ours = {name: f"{leaf.dtype.name}{list(shapes[name])}" for name, leaf in wanted.items()}
    names = [*ours, *(name for name in theirs if whole and name not in ours)]
    different = [name for name in names if theirs.get(name) != ours.get(name)]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more arrays)" if different[1:] else ""
        raise UserError(
            f"belongs to another model: {name} is {theirs.get(name, 'absent')} there and"
            f" {ours.get(name, 'absent')} here{more}"
        )


def gather_iterators(state: IteratorState) -> list[dict[str, Any]]:
    """The iterator states of all processes, in their order, as JSON values; one if all are equal.

    The one belongs to any number of processes (`data.pipeline.TrainIterator.get_state`).
    """
    mine: dict[str, Any] = {"json": state}
    if isinstance(state, bytes):
        mine = {"bytes": base64.b64encode(state).decode()}
    states = gather(json.dumps(mine))
    return [json.loads(text) for text in (states[:1] if len(set(states)) == 1 else states)]


def decode_iterator(stored: list[dict[str, Any]]) -> IteratorState:
    """This process's state, of what `gather_iterators` gave."""
    mine = stored[jax.process_index() if stored[1:] else 0]
    return base64.b64decode(mine["bytes"]) if "bytes" in mine else mine["json"]


class OneLine:
    """Context: whatever Orbax raises becomes one line for the user, its cause attached."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            if of_disk := disk_reason(error):
                room = "; after making room, the same command goes on" if _FULL in of_disk else ""
                raise UserError(f"{self._what}: {of_disk}{room}") from error
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = shown(": ".join([type(error).__name__, *lines[:1]]), quoted=False)
            raise UserError(f"{self._what} ({reason})") from error


def disk_reason(error: BaseException | None) -> str:
    """What the operating system said that led to this error, "No space left on device" for one; ""
    if nothing. Libraries in C++ have it somewhere in a text of many lines."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _OF_DISK:
            return os.strerror(error.errno)
        text = str(error)
        for number in _OF_DISK:
            if os.strerror(number) in text:
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    """All files below; epath has no recursive glob."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _name(path: epath.Path, directory: epath.Path) -> str:
    return str(path.relative_to(directory))


def _size_and_crc(path: epath.Path) -> list[int]:
    return [path.stat().length, _crc_of_file(path)]


def _crc_of_file(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
