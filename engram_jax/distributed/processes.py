"""Starts JAX on several processes, one per host, and logs from process 0 only."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import jax

from engram_jax.config.errors import UserError
from engram_jax.distributed.jax_internals import slice_of_host
from engram_jax.distributed.rendezvous import meet
from engram_jax.hardware.platforms import has_tpu_chips

JOIN_SECONDS = 300.0
_CONNECT_SECONDS = 60  # for JAX itself, when all processes are known to be running


@dataclass(frozen=True)
class Place:
    """This process's place in a launch. coordinator: HOST:PORT of process 0. processes: how many.
    process: this one's number. local_devices: ids, None = all of its host."""

    coordinator: str
    processes: int
    process: int
    local_devices: Sequence[int] | None = None


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    launch: Callable[[], Mapping[str, Any]] = dict,
    seconds: float = JOIN_SECONDS,
) -> None:
    """Join the other processes of this launch; call it before anything else asks JAX for devices.

    coordinator: HOST:PORT of process 0. processes: how many there are. process: this one's number.
    Without them a TPU host finds the other hosts of its slice, and any other machine runs alone.
    launch: values that must be the same on all of them (same_launch.describe_launch). seconds: how
    long process 0 and the others wait for each other.

    Raises UserError if only some are given or they are invalid, if the other processes do not join
    in time, or if they are of another launch.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"--join_seconds={seconds:g}: must be above 0 and finite")
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if _on_tpu() and (place := _of_slice(seconds)):
            _join(place, launch, seconds)
        return
    if missing:
        raise UserError(f"{missing[0]}: missing; --{', --'.join(given)} go together")
    assert coordinator is not None and processes is not None and process is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator_address={coordinator}: must be HOST:PORT")
    if processes < 1:
        raise UserError(f"--num_processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise UserError(
            f"--process_id={process}: must be at least 0 and below --num_processes={processes}"
        )
    if processes > 1:
        _join(Place(coordinator, processes, process), launch, seconds)


def log(line: str) -> None:
    """Print a line for the user, on process 0 only."""
    if jax.process_index() == 0:
        _say(line)


def warn(line: str) -> None:
    """Print a warning on standard error, on process 0 only."""
    if jax.process_index() == 0:
        _say(f"warning: {line}", sys.stderr)


def stages(stream: TextIO | None = None) -> Callable[[str], None]:
    """What prints lines that say what the program is doing, each with the seconds since this call.
    stream: standard output by default; on process 0 only."""
    began = time.monotonic()

    def tell(line: str) -> None:
        if jax.process_index() == 0:
            passed = time.monotonic() - began
            _say(f"[{passed:5.1f} s] {line}", stream)

    return tell


def _say(line: str, stream: TextIO | None = None) -> None:
    """In one write, so that lines of several threads stay whole. stream: standard output."""
    print(f"{line}\n", end="", file=stream or sys.stdout, flush=True)


def _on_tpu() -> bool:
    """Whether this machine has TPU chips that JAX will use, without initialising its backends."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    return has_tpu_chips() and importlib.util.find_spec("libtpu") is not None


def _of_slice(seconds: float) -> Place | None:
    """This host's place from the slice's metadata, as jax.distributed.initialize finds it.

    None for a TPU host that belongs to no slice known to JAX: it runs alone.
    """
    try:
        address, processes, process, devices = slice_of_host(math.ceil(seconds))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"the slice's hosts cannot be told: {_first_line(error)}") from error
    if address is None:
        return None
    if processes is None or process is None:
        raise UserError(f"the slice's hosts cannot be told: only their first, {address}, is known")
    return Place(address, processes, process, devices)


def _join(place: Place, launch: Callable[[], Mapping[str, Any]], seconds: float) -> None:
    if place.processes > 1:
        meet(place.coordinator, place.process, place.processes, launch(), seconds)
        _past_proxies(place.coordinator)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot join the processes at {place.coordinator}: {_first_line(error)}"
        ) from error


def _past_proxies(coordinator: str) -> None:
    """Make the processes of a launch connect directly, even if http_proxy is set."""
    if not any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        return
    name = "no_grpc_proxy"  # gRPC reads it in lower case, and no_proxy only without it
    hosts = os.environ.get(name) or os.environ.get("no_proxy") or ""
    host = coordinator.rpartition(":")[0].strip("[]")
    os.environ[name] = ",".join(filter(None, [hosts, host]))
    jax.config.update("jax_check_proxy_envs", False)  # the hang it warns of cannot happen now


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
