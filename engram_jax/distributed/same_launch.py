"""Compares the launches of a run's processes: all that affects a result must be equal.

Other settings may differ: `MAY_DIFFER` (where a host stores its prepared data, whose content is
compared later, and its number of reading workers), the coordinator's address, and what JAX logs,
dumps and caches.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import engram_jax
from engram_jax.config import Config
from engram_jax.config.difference import ABSENT, flat
from engram_jax.monitoring.provenance import git_commit, versions

MAY_DIFFER = ("config.data.cache_dir", "config.data.workers")
_JAX_MAY_DIFFER = (
    "jax_check_proxy",
    "jax_compilation_cache",
    "jax_compiler_detailed_logging",
    "jax_cpu_get_",  # timeouts
    "jax_cross_host_transfer",
    "jax_cross_host_transport",
    "jax_cuda_visible_devices",
    "jax_debug_log",
    "jax_dump_ir",
    "jax_explain",
    "jax_log",
    "jax_oneapi_visible_devices",
    "jax_persistent_cache",
    "jax_pprint",
    "jax_rocm_visible_devices",
    "jax_traceback",
    "jax_tracer_error",
)
_COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SOURCES = (".py", ".json", ".npz")
_SHOWN = 4  # keys in a message, and values of each
_LONGEST = 100  # characters of a value


def describe_launch(config: Config, command: Mapping[str, Any]) -> dict[str, Any]:
    """This process's launch: name -> JSON value. Does not initialise JAX's devices.

    command: the other flags, by name.
    """
    found = {f"config.{key}": value for key, value in flat(config).items()}
    found = {key: value for key, value in found.items() if key not in MAY_DIFFER}
    found |= {f"--{name}": value for name, value in command.items()}
    package = Path(engram_jax.__file__).parent
    found["git commit"] = (git_commit(package) or {}).get("commit")
    found["digest of the code"] = code_digest(package.parent)
    found |= {f"version of {name}": version for name, version in versions().items()}
    for name, value in sorted(jax.config.values.items()):
        if not name.startswith(_JAX_MAY_DIFFER):
            value = value.name if isinstance(value, enum.Enum) else value
            plain = isinstance(value, bool | int | float | str | None)
            found[f"setting {name}"] = value if plain else str(value)
    for name in _COMPILER_FLAGS:
        given = os.environ.get(name, "").split()
        found[name] = " ".join(flag for flag in given if not flag.startswith("--xla_dump"))
    return found


def code_digest(root: Path) -> str:
    """16 hex digits of the SHA-256 of the code: launch.py and the two packages below `root`."""
    paths = [root / "launch.py"] if (root / "launch.py").is_file() else []
    for package in ("engram_jax", "kernels_pallas"):
        paths += [path for path in (root / package).rglob("*") if path.suffix in _SOURCES]
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def disagreement(launches: Sequence[Mapping[str, Any]]) -> str:
    """One line with the differences between the launches of processes 0, 1, ...; "" without any.

    A host without git does not know its commit; its code is compared nevertheless.
    """
    keys = {key: None for launch in launches for key in launch}
    found = []
    for key in keys:
        ranks: dict[str, list[int]] = {}
        for rank, launch in enumerate(launches):
            value = launch.get(key, ABSENT)
            if key != "git commit" or value is not None:
                ranks.setdefault(_shown(value), []).append(rank)
        if len(ranks) > 1:
            some = [f"{value} on {named(ranks[value])}" for value in list(ranks)[:_SHOWN]]
            found.append(f"{key}: {', '.join(some)}")
    if not found:
        return ""
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    return f"{'; '.join(found[:_SHOWN])}{more}; give every host the same command and code"


def named(ranks: Sequence[int]) -> str:
    """ "process 3", "processes 1, 2, 3 and 12 others"."""
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    if len(ranks) <= 8:
        return f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    return f"processes {', '.join(map(str, ranks[:6]))} and {len(ranks) - 6} others"


def _shown(value: Any) -> str:
    """The value as one line, equal only for equal values."""
    several = isinstance(value, list | tuple)
    text = f"({', '.join(map(_shown, value))})" if several else repr(value)
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[:_LONGEST]}... (SHA-256 {digest})"
