"""Many processes, one per host: how they find each other, and who talks."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys

import jax

from engram_jax.errors import UserError


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of this launch; call it before anything else asks JAX for devices.

    coordinator: HOST:PORT of process 0. processes: how many there are. process: which this is.
    Without them a TPU host finds its slice by itself, and any other machine is alone.

    Raises UserError if they are given in part or make no sense, or if the others do not come.
    """
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if _on_tpu():
            _join(None)
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
        _join({**given, "cluster_detection_method": "deactivate"})


def log(line: str) -> None:
    """What the user reads, once: from process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


def warn(line: str) -> None:
    """What the user should know and did not ask for, once, on standard error."""
    if jax.process_index() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _on_tpu() -> bool:
    """Whether this machine has TPU chips that JAX is to use. Asks nothing of JAX's backends."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _join(arguments: dict | None) -> None:
    try:
        jax.distributed.initialize(**arguments or {})
    except ValueError as error:
        if arguments is not None:
            raise
        if "coordinator_address should be defined" not in str(error):
            raise UserError(f"the slice's hosts cannot be told: {_first_line(error)}") from error
        # A TPU host that belongs to no slice that JAX knows of: it is alone.
    except RuntimeError as error:
        where = arguments["coordinator_address"] if arguments else "the slice's first host"
        raise UserError(f"cannot join the processes at {where}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
