"""Reads JSON files as documents: the text key of every record of JSON lines, or of an array.

Files are read in pieces: no file is ever whole in memory, only a record.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from engram_jax.data import source_report as why
from engram_jax.data.documents import Spool, add_text
from engram_jax.data.source_report import SourceReport

# Bytes. A record is parsed whole: a longer one is skipped, and counted.
MAX_JSON_LINE = 64 << 20
_BLOCK = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()

Found = tuple[int, Counter[str]]


def add_json(
    spool: Spool, path: Path, name: str, origin: int, text_key: str, max_bytes: int
) -> Found:
    """Add the records of a .json file: an array of objects, JSON lines, or one object over several
    lines. Arguments and result as `add_json_lines`."""
    with open(path, "rb") as file:
        head = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    first, *_ = re.split(rb"[\r\n]", head, maxsplit=1)
    if not head.startswith(b"[") and _parsed(first) is not None:
        return add_json_lines(spool, path, name, origin, text_key, max_bytes)
    records = _Records(spool, name, origin, text_key, max_bytes)
    with open(path, "rb") as file:
        for number, (record, size) in enumerate(_values(file), 1):
            records.add(f"{name}:{number}", record, size)
    return records.origin, records.other_keys


def add_json_lines(
    spool: Spool, path: Path, name: str, origin: int, text_key: str, max_bytes: int
) -> Found:
    """Add the `text_key` of every line as a document; lines end in LF, CR LF or CR. Returns the
    next free origin, and counts of the keys of the records that lack it."""
    records = _Records(spool, name, origin, text_key, max_bytes)
    with open(path, "rb") as file:
        for number, line in _lines(file, spool.report, name):
            records.add(f"{name}:{number}", line, len(line))
    return records.origin, records.other_keys


class _Records:
    """Adds records to a spool, and counts what is left out. origin: the next free one."""

    def __init__(self, spool: Spool, name: str, origin: int, text_key: str, max_bytes: int):
        self._spool, self._name = spool, name
        self._text_key, self._max_bytes = text_key, max_bytes
        self.origin, self.other_keys = origin, Counter[str]()

    def add(self, where: str, record: Any, size: int) -> None:
        """record: JSON text as bytes, or its value; None = it is no JSON. size: bytes."""
        skip = self._spool.report.skip
        if self._spool.full:
            skip(why.OVER_LIMIT, where, size)
            return
        if isinstance(record, bytes):
            try:
                record = _parsed(record)
            except UnicodeDecodeError:
                skip(why.NOT_UTF8, where, size)
                return
        if not isinstance(record, dict):
            skip(why.BAD_JSON, where, size)
        elif self._text_key not in record:
            skip(why.NO_KEY, where, size)
            self.other_keys.update(record.keys())
        elif not isinstance(record[self._text_key], str):
            skip(why.NOT_TEXT, where, size)
        else:
            add_text(self._spool, where, record[self._text_key], self.origin, self._max_bytes)
            self.origin += 1


def _parsed(line: bytes) -> Any:
    """The value of a JSON text, None if it is none. Raises UnicodeDecodeError."""
    text = line.decode("utf-8-sig")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(file: BinaryIO, report: SourceReport, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; one that is too long is skipped without being held."""
    number, held, skipped = 0, b"", 0  # skipped: bytes of a line that is too long, so far
    for block in _blocks(file):
        *ended, held = (held + block).split(b"\n")
        for line in ended:
            number += 1
            if skipped or len(line) > MAX_JSON_LINE:
                report.skip(why.LONG_LINE, f"{name}:{number}", skipped + len(line) + 1)
                skipped = 0
            elif line.strip():
                yield number, line
        if skipped or len(held) > MAX_JSON_LINE:
            skipped, held = skipped + len(held), b""
    if skipped:
        report.skip(why.LONG_LINE, f"{name}:{number + 1}", skipped + len(held))
    elif held.strip():
        yield number + 1, held


def _blocks(file: BinaryIO | RawIOBase) -> Iterator[bytes]:
    """The file in pieces, with every end of a line (CR LF, CR) as LF."""
    after_cr = False
    while block := file.read(min(_BLOCK, MAX_JSON_LINE)):
        if after_cr:
            block = b"\r" + block
        after_cr = block.endswith(b"\r")
        block = block[:-1] if after_cr else block
        yield block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if after_cr:
        yield b"\n"


def _values(file: BinaryIO) -> Iterator[tuple[Any, int]]:
    """(value, characters) of the items of an array, or of JSON values one after another. At
    something that is no JSON, or too long, the rest cannot be told apart: (None, its bytes)."""
    window, array, begun, closed = _Window(file), False, False, False
    while window.skip_blank():
        character = window.text[window.at]
        if not begun:
            begun, array = True, character == "["
            window.at += array
        elif array and not closed and character in ",]":
            closed = character == "]"
            window.at += 1
        else:
            value, size = (None, 0) if closed else window.value()
            if not size:
                yield None, window.rest()
                return
            yield value, size
    if array and not closed:  # truncated
        yield None, window.rest()


class _Window:
    """The part of a file's text that is being read; `at` is where."""

    def __init__(self, file: BinaryIO):
        self.text, self.at = "", 0
        self._file, self._ended = file, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._wanted = _BLOCK

    def more(self) -> bool:
        """Read on, unless the file has ended, or what is held is too long."""
        if self._ended or len(self.text) - self.at > MAX_JSON_LINE:
            return False
        data = self._file.read(self._wanted)
        self._wanted *= 2  # a long record is not tried again for every block
        self._ended = not data
        # Bytes that are not UTF-8 become lone surrogates, which their own document is refused for.
        text = self._decoder.decode(data, self._ended)
        self.text, self.at = self.text[self.at :] + text, 0
        return True

    def skip_blank(self) -> bool:
        """Go to the next character that is not blank; False if there is none."""
        while True:
            found = _BLANK.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def value(self) -> tuple[Any, int]:
        """The JSON value here and how many characters it takes; 0 if it is none."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError):
                if self.more():
                    continue
                return None, 0
            if end == len(self.text) and self.more():  # a number may go on
                continue
            size, self.at, self._wanted = end - self.at, end, _BLOCK
            return value, size

    def rest(self) -> int:
        """Bytes of what has not been read, about."""
        left = sum(len(block) for block in iter(lambda: self._file.read(_BLOCK), b""))
        return len(self.text) - self.at + left
