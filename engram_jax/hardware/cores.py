"""How many CPU cores there are to compute with."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores this process may use: what `taskset` or a container leaves it. So do XLA's threads
    on a CPU count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
