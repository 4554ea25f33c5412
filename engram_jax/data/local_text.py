"""The embedded default: the sources of the standard library of the Python that runs this.

About 10 MB of code and of the English in it, on every machine already. Nothing that is installed
beside it plays a part, so two machines with the same Python version read the same text, unless
their distributors changed its sources; the data's digest says whether they did.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_jax.config import DataConfig
from engram_jax.config.errors import UserError
from engram_jax.data import source_report as why
from engram_jax.data.documents import Spool, add_text
from engram_jax.data.folder_text import File, in_hash_order

LIBRARY = f"standard library of Python {platform.python_version()}"  # what a report calls it

# What is not the same, or not there, in every installation of one version: Linux distributors make
# packages of their own of some modules, leave out tests and what macOS alone needs; two modules
# describe the installation.
_NOT_EVERYWHERE = {
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"),
    *("site", "sysconfig"),
}
# Tables of characters; the language reference, as generated strings.
_NOT_SOURCE = {"encodings", "pydoc_data"}
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "macholib"}
_MIN_TEXT_SHARE = 0.7  # of letters, spaces and line ends; tables of numbers have less


class LocalText:
    """The library's files, listed by `sys.stdlib_module_names`; each is one document.

    Raises UserError where there are no sources (a Python whose library is in a zip file, say).
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        root = Path(sysconfig.get_path("stdlib"))
        self.files = in_hash_order(list_library(root))
        if not self.files:
            raise UserError(
                f"config.data.source = 'local': no sources of Python's standard library in {root};"
                " give text with config.data.source=folder and config.data.path"
            )

    def manifest(self) -> list[Any]:
        """What tells, without reading a file, whether any has changed."""
        files = [[str(f.path), f.size, f.mtime_ns] for f in self.files]
        return ["standard library", platform.python_version(), files]

    def collect(self, spool: Spool) -> None:
        """Put every document into the spool."""
        for origin, file in enumerate(self.files):
            if spool.full:
                spool.report.skip(why.OVER_LIMIT, file.name, file.size)
                continue
            try:
                text = file.path.read_bytes().decode()
            except OSError:
                spool.report.skip(why.UNREADABLE, file.name, file.size)
                continue
            except UnicodeDecodeError:
                spool.report.skip(why.NOT_UTF8, file.name, file.size)
                continue
            if len(re.findall(r"[A-Za-z \n]", text)) < _MIN_TEXT_SHARE * len(text):
                spool.report.skip(why.NUMBERS, file.name, file.size)
                continue
            add_text(spool, file.name, text, origin, self._config.max_document_bytes)


def list_library(root: Path) -> list[File]:
    """The library's sources below `root`, by module; names are paths below `root`.

    `sys.stdlib_module_names` is the same on all platforms and knows neither tests nor what a
    distributor or an installer puts into the folder.
    """
    found: list[File] = []
    for module in sorted(sys.stdlib_module_names - _NOT_EVERYWHERE - _NOT_SOURCE):
        for path in (root / f"{module}.py", *_package(root / module)):
            if path.is_file():
                status = path.stat()
                name = path.relative_to(root).as_posix()
                found.append(File(path, name, status.st_size, status.st_mtime_ns))
    return found


def _package(folder: Path) -> Iterator[Path]:
    for below, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(below, name) for name in names if name.endswith(".py"))
