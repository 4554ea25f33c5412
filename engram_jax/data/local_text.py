"""The embedded default: English and code that every machine with this project installed already
has.

Three parts, none of which needs a network: prose (the Python language reference that `help()`
prints, the descriptions of installed packages, their .md and .rst files), the standard library's
sources, and the sources of installed packages. They are mixed in fixed shares and cut off at
data.max_megabytes. Only packages that this project needs to run are read: a run can be resumed
after others were installed beside it. Their versions and Python's still matter, so the text differs
a little between machines; the data set's fingerprint says whether two runs read the same.
"""

from __future__ import annotations

import importlib
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_jax.config import DataConfig
from engram_jax.data import report as why
from engram_jax.data.documents import Spool, add_text
from engram_jax.data.folder_text import File, in_hash_order
from engram_jax.data.installed import needed
from engram_jax.data.report import SourceReport

DEFAULT_MEGABYTES = 24
# Share of the limit that each part may take before the others have had theirs.
SHARES = {"prose": 0.25, "stdlib": 0.5, "packages": 0.25}

_MAX_FILE_BYTES = 128 << 10  # larger sources are mostly tables and generated code
_MIN_TEXT_SHARE = 0.7  # of letters, spaces and line ends; tables of numbers have less
_SKIPPED_FOLDERS = {
    *("__pycache__", "test", "tests", "testing", "test_data", "testdata", "idle_test"),
    *("site-packages", "dist-packages", "encodings", "pydoc_data"),
    *("_vendor", "vendor", "_vendored", "_distutils", "_unicode_data", "node_modules"),
}
_GENERATED = re.compile(r"(_pb2(_grpc)?|_gen|_generated)\.py$|(^|[/\\])_sysconfigdata")
_TOPICS = "pydoc_data/topics"


class LocalText:
    """Files of the three parts, chosen by name, size and share; see the module."""

    def __init__(self, config: DataConfig, report: SourceReport) -> None:
        self._config = config
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        installed = dict(_installed())
        parts: dict[str, list[File]] = {
            "prose": _files(stdlib / "pydoc_data" / "topics.py", _TOPICS) + _prose(installed),
            "stdlib": _sources(dict(_walk(stdlib)), "stdlib"),
            "packages": _sources(installed, "packages"),
        }
        budget = (config.max_megabytes or DEFAULT_MEGABYTES) * 1_000_000
        self.files = choose({part: in_hash_order(files) for part, files in parts.items()}, budget)
        sizes = {part: sum(f.size for f in files) / 1e6 for part, files in self.files.items()}
        report.notes.append(
            "embedded text: " + ", ".join(f"{part} {size:.1f} MB" for part, size in sizes.items())
        )

    def manifest(self) -> list[Any]:
        """What tells, without reading a file, whether any has changed."""
        files = [[str(f.path), f.size, f.mtime_ns] for part in self.files.values() for f in part]
        return ["local", files]

    def collect(self, spool: Spool) -> None:
        """Put every document into the spool."""
        origin = 0
        for file in (f for part in self.files.values() for f in part):
            for name, text in _texts(file, spool.report):
                add_text(spool, name, text, origin, self._config.max_document_bytes)
                origin += 1


def choose(parts: dict[str, list[File]], budget: int) -> dict[str, list[File]]:
    """Files of each part up to its share of `budget` bytes; then, in the order of the parts,
    whatever still fits."""
    chosen: dict[str, list[File]] = {part: [] for part in parts}
    left_over: dict[str, list[File]] = {part: [] for part in parts}
    total = 0
    for part, files in parts.items():
        share = SHARES[part] * budget
        for file in files:
            if file.size <= share:
                share -= file.size
                total += file.size
                chosen[part].append(file)
            else:
                left_over[part].append(file)
    for part in ("packages", "stdlib", "prose"):
        for file in left_over[part]:
            if total + file.size <= budget:
                total += file.size
                chosen[part].append(file)
    return chosen


def _files(path: Path | str, name: str) -> list[File]:
    """The file, or nothing where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [File(Path(path), name, status.st_size, status.st_mtime_ns)]


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """(name below root, path) of the files that a reader of this machine's text would look at."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(n for n in folders if not _skipped(n))
        below = os.path.relpath(folder, root)
        for name in sorted(names):
            yield name if below == "." else f"{below}/{name}", os.path.join(folder, name)


def _installed() -> Iterator[tuple[str, str]]:
    """(name below site-packages, path) of such files of the packages this project needs."""
    for package in needed():
        for file in package.files or ():  # ".." leads to programs and manual pages
            if ".." not in file.parts and not any(map(_skipped, file.parts[:-1])):
                yield file.as_posix(), str(file.locate())


def _skipped(folder: str) -> bool:
    return folder in _SKIPPED_FOLDERS or folder.startswith(".")


def _sources(paths: Mapping[str, str], prefix: str) -> list[File]:
    """paths: name -> path."""
    files: list[File] = []
    for name, path in paths.items():
        if name.endswith(".py") and not _GENERATED.search(name):
            found = _files(path, f"{prefix}/{name}")
            files += [f for f in found if 0 < f.size <= _MAX_FILE_BYTES]
    return files


def _prose(paths: Mapping[str, str]) -> list[File]:
    """Descriptions and documents; licences are left out, since near copies of them would fall on
    both sides of the held-out split."""
    files: list[File] = []
    for name, path in paths.items():
        stem = os.path.basename(name).upper()
        if (
            stem.startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS"))
            or "/licenses/" in name
        ):
            continue
        if stem == "METADATA" or name.endswith((".md", ".rst")):
            files += _files(path, f"docs/{name}")
    return files


def _texts(file: File, report: SourceReport) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents in one file."""
    if file.name == _TOPICS:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        for topic, text in sorted(topics.items()):
            yield f"{_TOPICS}/{topic}", text
        return
    try:
        text = file.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        report.skip(why.NOT_UTF8, file.name, file.size)
        return
    if file.name.endswith("/METADATA"):  # headers, a blank line, the description
        text = text.partition("\n\n")[2]
    elif len(re.findall(r"[A-Za-z \n]", text)) < _MIN_TEXT_SHARE * len(text):
        report.skip(why.NUMBERS, file.name, file.size)
        return
    yield file.name, text
