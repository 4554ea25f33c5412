"""Reads files and JSON lines as clean, distinct documents, collected in one temporary file.

A document is UTF-8 text that is not blank, at most `max_document_bytes` long (longer ones are split
at line ends, so that no file, however large, is ever whole in memory), and different from every
other document. Everything that is skipped is counted in the report.
"""

from __future__ import annotations

import array
import codecs
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engram_jax.data import source_report as why
from engram_jax.data.source_report import SourceReport

_BLOCK = 1 << 20
_HEAD = 4096  # bytes that tell what a file is


class Spool:
    """Documents of one source, in one temporary file with their digests and lengths in memory.

    limit: bytes of text to keep; the first document beyond it sets `full`, and readers then stop
    reading and count the rest as skipped.
    """

    def __init__(self, path: Path, report: SourceReport, limit: int | None = None) -> None:
        self.report = report
        self.limit = limit
        self.full = False
        self.bytes = 0
        self.path = path
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by close()
        self._digests: dict[bytes, int] = {}
        self._sizes = array.array("q")
        self._origins = array.array("q")

    def add(self, name: str, text: bytes, origin: int) -> None:
        """Keep one document, or part of one; `origin` is the number of the whole document."""
        reason = defect(text)
        digest = hashlib.sha256(text).digest()[:16]
        if reason is None and digest in self._digests:
            reason = why.DUPLICATE
        elif reason is None and self.limit is not None and self.bytes + len(text) > self.limit:
            self.full, reason = True, why.OVER_LIMIT
        if reason is not None:
            self.report.skip(reason, name, len(text))
            return
        self._digests[digest] = len(self._sizes)
        self._sizes.append(len(text))
        self._origins.append(origin)
        self._file.write(text)
        self.bytes += len(text)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def digests(self) -> np.ndarray:
        """uint8 [documents, 16]: the first bytes of each document's SHA-256."""
        return np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 16)

    def digest_order(self) -> np.ndarray:
        """int64 [documents]: document numbers in ascending order of digest."""
        high, low = self.digests.view(">u8").T
        return np.lexsort((low, high))

    @property
    def sizes(self) -> np.ndarray:
        """int64 [documents]: bytes."""
        return np.asarray(self._sizes, np.int64)

    @property
    def origins(self) -> np.ndarray:
        """int64 [documents]: the number of the whole document that each is from."""
        return np.asarray(self._origins, np.int64)

    def read(self, order: np.ndarray) -> Iterator[bytes]:
        """The documents numbered `order`, in that order."""
        sizes = self.sizes
        starts = np.cumsum(sizes) - sizes
        self._file.flush()
        for i in order.tolist():
            self._file.seek(starts[i])
            yield self._file.read(sizes[i])

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def split_text(text: bytes, limit: int) -> Iterator[bytes]:
    """Split `text` into parts of at most `limit` bytes, after line ends where there are any."""
    start = 0
    while len(text) - start > limit:
        end = start + _cut_point(text[start : start + limit + 1], limit)
        yield text[start:end]
        start = end
    yield text[start:]


def defect(text: bytes) -> str | None:
    """Why `text` cannot be a document, or None."""
    if not text.strip():
        return why.EMPTY
    try:
        text.decode()
    except UnicodeDecodeError:
        return why.NOT_UTF8
    return None


def add_text(spool: Spool, name: str, text: str, origin: int, max_bytes: int) -> None:
    """Add a document that is already a string, split into parts of at most `max_bytes` bytes."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        spool.report.skip(why.NOT_UTF8, name, len(text))
        return
    pieces = list(split_text(encoded, max_bytes))
    spool.report.cut_documents += len(pieces) > 1
    for piece in pieces:
        spool.add(name, piece, origin)


def foreign_format(path: Path) -> str | None:
    """What a file is that holds its text in another form than UTF-8, with the remedy, as the reason
    why it is left out; None for one that may be text."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    for start, reason in why.FORMATS:
        if head.startswith(start):
            return reason
    if head[257:262] == b"ustar":
        return "tar: unpack it (tar -xf)"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return why.UTF16
    # Without a mark: every other byte of ASCII is NUL.
    pairs = len(head) // 2
    for zeros, others in ((head[1::2], head[::2]), (head[::2], head[1::2])):
        if pairs >= 2 and zeros.count(0) > 0.6 * pairs and others.count(0) < 0.1 * pairs:
            return why.UTF16
    return None


def add_file(spool: Spool, path: Path, name: str, origin: int, max_bytes: int) -> None:
    """Add a text file as one document, read in parts. It is skipped if it has a NUL byte."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        if any(b"\0" in block for block in iter(lambda: file.read(_BLOCK), b"")):
            spool.report.skip(why.BINARY, name, left)
            return
        file.seek(0)
        rest, pieces = file.read(max_bytes + 1), 0
        rest = rest.removeprefix(codecs.BOM_UTF8)
        while (rest := rest + file.read(max_bytes + 1 - len(rest))) or not pieces:
            if spool.full:
                spool.report.skip(why.OVER_LIMIT, name, left)
                return
            end = _cut_point(rest, max_bytes) if len(rest) > max_bytes else len(rest)
            spool.add(name, rest[:end], origin)
            rest, pieces, left = rest[end:], pieces + 1, left - end
        spool.report.cut_documents += pieces > 1


def _cut_point(text: bytes, limit: int) -> int:
    """Where to split a text longer than `limit`: after the last line end, else space, else
    character."""
    for separator in (b"\n", b" "):
        if (at := text.rfind(separator, 0, limit)) >= 0:
            return at + 1
    at = limit
    while at > max(1, limit - 4) and text[at] & 0xC0 == 0x80:  # inside a UTF-8 character
        at -= 1
    return at
