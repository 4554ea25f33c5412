"""Chooses the implementation of an operation: the reference, a TPU kernel or a GPU kernel."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import jax

AUTO, REFERENCE, PALLAS = "auto", "reference", "pallas"
IMPLEMENTATIONS = (AUTO, REFERENCE, PALLAS)
TPU, GPU, CPU = "tpu", "gpu", "cpu"

_log = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()


class UnsupportedError(ValueError):
    """A kernel was requested explicitly and does not support these arguments; the message says
    why."""


@dataclass(frozen=True)
class Choice:
    """kernel: TPU, GPU or None (the reference); interpret: run the kernel's program on a CPU."""

    kernel: str | None
    interpret: bool = False


def device() -> tuple[str, str]:
    """(platform, device kind) that the code being traced is for.

    It is that of the mesh in context, which may have topology devices (ahead-of-time compilation),
    or else of the default device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return _platform(abstract.platform), abstract.device_kind
    default = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return _platform(default.platform), default.device_kind


def spread() -> bool:
    """Whether the code being traced may be partitioned by XLA, which cannot partition a kernel: it
    is not inside shard_map, and there are several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return any(size > 1 for n, size in mesh.shape.items() if n not in mesh.manual_axes)
    return jax.device_count() > 1


def _platform(name: str) -> str:
    return GPU if name in ("cuda", "rocm", "gpu") else name


def choose(op: str, implementation: str, limits: Mapping[str, str | None]) -> Choice:
    """The implementation to run, decided while tracing.

    Args:
      op: the operation's name, for messages.
      implementation: AUTO, REFERENCE, or PALLAS (the kernel or an error; on a CPU the TPU kernel
        is interpreted, slowly: for tests).
      limits: kernel (TPU, GPU) -> why it does not support these arguments, or None if it does. A
        missing kernel is never chosen.

    Raises:
      UnsupportedError: PALLAS, and the kernel does not support the arguments.
      ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == REFERENCE:
        return Choice(None)
    platform, kind = device()
    kernel = TPU if platform == CPU else platform
    reason = limits.get(kernel, f"there is no kernel for {kernel}")
    if implementation == PALLAS:
        if reason is not None:
            raise UnsupportedError(f"{op}: {reason}")
        return Choice(kernel, interpret=platform == CPU)
    if platform == CPU:
        return Choice(None)
    if reason is None and spread():
        reason = "several devices, and this is not inside shard_map (its check_vma=False)"
    if reason is not None:
        _tell(op, kind, reason)
        return Choice(None)
    return Choice(kernel)


def _tell(op: str, kind: str, reason: str) -> None:
    """Log one line for each operation, device and reason."""
    if (op, kind, reason) not in _told:
        _told.add((op, kind, reason))
        _log.warning("%s: the reference runs on %s, not the kernel: %s", op, kind, reason)
