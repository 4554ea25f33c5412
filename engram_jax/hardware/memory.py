"""How much memory there is: of the machine or the container, and of a device."""

from __future__ import annotations

import os
from pathlib import Path

_PROCESS = Path("/proc/self/cgroup")
_CONTROL = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # the old interface says "no limit" with a number above it


def machine_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where a container (its
    control group) has a limit."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([there, *_limits()])


def device_bytes() -> int:
    """Bytes of memory of one of this process's devices; a CPU's is the machine's."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or machine_bytes())


def all_devices_bytes() -> int:
    """Of all devices of all processes; those of a CPU share the machine's."""
    import jax

    if jax.default_backend() == "cpu":
        return machine_bytes() * jax.process_count()
    return device_bytes() * jax.device_count()


def _limits() -> list[int]:
    """Limits of the control groups that this process is in, and of those above."""
    try:
        lines = _PROCESS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        unified = not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        root = _CONTROL if unified else _CONTROL / "memory"
        name = "memory.max" if unified else "memory.limit_in_bytes"
        folder = root / place.lstrip("/")
        for each in (folder, *folder.parents):
            try:
                limit = int((each / name).read_text())
            except (OSError, ValueError):  # not there in a container's view, or "max"
                limit = _UNLIMITED
            if limit < _UNLIMITED:
                found.append(limit)
            if each == root:
                break
    return found
