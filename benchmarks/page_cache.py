"""A file that must be read from the disk: a process in a memory cgroup (version 1, as root), and
proof that its page cache was as small as it was meant to be.

The process joins before it allocates anything: what was charged elsewhere would not count. The
limit is set when its own memory is all there; what is left of it is the page cache's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_ROOT = Path("/sys/fs/cgroup/memory")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Group:
    """This process in a cgroup of its own. cache_bytes: the page cache at its largest, as noted."""

    folder: Path
    allowed: int = 0
    cache_bytes: list[int] = field(default_factory=list)

    def limit(self, cache: int) -> None:
        """From now on the page cache has `cache` bytes, less what the process still grows by."""
        self.allowed = cache
        (self.folder / "memory.limit_in_bytes").write_text(str(self._stat("total_rss") + cache))

    def note(self) -> None:
        """Look at the page cache; more than was allowed ends the program."""
        self.cache_bytes.append(self._stat("total_cache"))
        if self.cache_bytes[-1] > self.allowed:
            sys.exit(f"the page cache has {self.cache_bytes[-1]} bytes, allowed {self.allowed}")

    def _stat(self, name: str) -> int:
        lines = (self.folder / "memory.stat").read_text().split("\n")
        return int(dict(line.split() for line in lines if line)[name])


def join() -> Group:
    """Ends the program where there is no such cgroup."""
    folder = _ROOT / f"page-cache-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        sys.exit(f"{folder}: {error.strerror}; needs root and cgroup version 1's memory controller")
    atexit.register(_leave, folder)
    return Group(folder)


def _leave(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (_ROOT / "cgroup.procs").write_text(str(os.getpid()))
        folder.rmdir()


def forget(path: Path) -> float:
    """Drop a file's pages; the share of them that stays."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Only a mapping can be asked; it is not read, so that it brings no page in.
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            memory = np.frombuffer(mapped, np.uint8)
            start, length = memory.ctypes.data, memory.size
            del memory
            seen = np.zeros(-(-length // _PAGE), np.uint8)
            where = seen.ctypes.data_as(ctypes.c_void_p)
            if _libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), where):
                raise OSError(ctypes.get_errno(), "mincore")
    return int((seen & 1).sum()) / seen.size


def read_bytes() -> int:
    """What this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
