"""The report of a text source: documents kept, and everything skipped, counted by reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from engram_jax.config.errors import shown

EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
BINARY = "binary (NUL bytes)"
UNREADABLE = "unreadable"
HIDDEN = "hidden (name starts with a dot)"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate of a held-out document"
BAD_JSON = "not a JSON object"
FORMATS = (  # how files begin that hold text in another form, and how it is got out
    (b"\x1f\x8b", "gzip: unpack it (gunzip)"),
    (b"PK\x03\x04", "zip: unpack it (unzip)"),
    (b"BZh", "bzip2: unpack it (bunzip2)"),
    (b"\xfd7zXZ\0", "xz: unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "Zstandard: unpack it (unzstd)"),
    (b"\x04\x22\x4d\x18", "LZ4: unpack it (unlz4)"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip: unpack it (7z x)"),
    (b"PAR1", "Parquet: write its text column as JSON lines"),
    (b"ARROW1", "Arrow: write its text column as JSON lines"),
    (b"\xff\xff\xff\xff", "Arrow stream: write its text column as JSON lines"),
    (b"SQLite format 3\0", "SQLite: write its text column as JSON lines"),
    (b"\x89HDF\r\n\x1a\n", "HDF5: write its text as JSON lines"),
    (b"%PDF-", "PDF: convert it to text (pdftotext)"),
)
NO_KEY = "JSON without the text key"
NOT_TEXT = "JSON text that is not a string"
LONG_LINE = "JSON line too long"
NUMBERS = "mostly digits or punctuation"
UTF16 = "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)"
OVER_LIMIT = "beyond data.max_megabytes"

_EXAMPLES = 3


def printable(name: str) -> str:
    """A file's name on one line: what is not printable is escaped, bytes that are not UTF-8 as
    \\udcff for 0xff."""
    return shown(name, quoted=False)


@dataclass
class Skipped:
    """One reason's tally: `count` documents, files or lines of `bytes` bytes, the first few by
    name."""

    count: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class SourceReport:
    """Documents kept and skipped. Bytes are UTF-8 bytes of text.

    train_documents, validation_documents: after splitting; cut_documents: how many were longer than
    data.max_document_bytes and were split. notes: anything else the reader should know.
    digest: equal for equal documents in equal splits: losses on them can be compared.
    """

    source: str = ""
    digest: str = ""
    train_documents: int = 0
    train_bytes: int = 0
    validation_documents: int = 0
    validation_bytes: int = 0
    cut_documents: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = printable(self.source)

    def skip(self, reason: str, name: str, size: int, count: int = 1) -> None:
        """Count a skipped document, file or line (or `count` of them) of `size` bytes."""
        tally = self.skipped.setdefault(reason, Skipped())
        tally.count += count
        tally.bytes += size
        if len(tally.examples) < _EXAMPLES:
            tally.examples.append(printable(name))

    def skip_some(self, reason: str, name: str, sizes: Any) -> None:
        """Count several documents of these sizes (a NumPy array), none if it is empty."""
        if len(sizes):
            self.skip(reason, name, int(sizes.sum()), len(sizes))

    def bytes_of(self, reason: str) -> int:
        """Bytes skipped for a reason so far."""
        return self.skipped[reason].bytes if reason in self.skipped else 0

    def log(self, log: Callable[[str], Any]) -> None:
        """Log the report in a few lines."""
        log(
            f"data: {self.source}: {self.train_documents:,} documents "
            f"({self.train_bytes / 1e6:.2f} MB) to train on, {self.validation_documents:,} "
            f"({self.validation_bytes / 1e6:.2f} MB) held out, digest {self.digest}"
        )
        if self.cut_documents:
            log(f"data: {self.cut_documents:,} documents were longer than the limit and were cut")
        for reason, tally in sorted(self.skipped.items()):
            names = ", ".join(tally.examples) + (
                ", ..." if tally.count > len(tally.examples) else ""
            )
            log(f"data: left out {tally.count:,} ({tally.bytes / 1e6:.2f} MB), {reason}: {names}")
        for note in self.notes:
            log(f"data: {note}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SourceReport:
        skipped = {reason: Skipped(**tally) for reason, tally in values["skipped"].items()}
        return cls(**(values | {"skipped": skipped}))
