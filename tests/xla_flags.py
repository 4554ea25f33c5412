"""How XLA compiles in the fast tests and in the processes that they start: neither optimising nor,
where no libtpu is loaded, through MLIR, which takes half the time of a compilation and less."""

from __future__ import annotations

import os

LEVEL = "--xla_backend_optimization_level="
QUICK = f"{LEVEL}0"
# libtpu reads XLA_FLAGS, too, and ends a process in which they have this.
CPU_ALONE = "--xla_cpu_use_fusion_emitters=false"


def is_quick(flags: str) -> bool:
    """Whether the last level that `flags` name is 0."""
    _, there, level = flags.rpartition(LEVEL)
    return bool(there) and level.split()[0] == "0"


def cpu_flags(*more: str) -> str:
    """XLA_FLAGS for a process that computes on CPUs and compiles as this one does, so that their
    results can be compared bit by bit. more: other flags."""
    flags = os.environ.get("XLA_FLAGS", "")
    return " ".join([flags, *([CPU_ALONE] if is_quick(flags) else []), *more]).strip()
