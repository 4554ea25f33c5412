"""Private functions of JAX for several processes: the coordinator's store, a host's slice.

This is the only file that uses private parts of jax. They may change with any release:
pyproject.toml bounds jax below the next minor one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jax._src import clusters, distributed


def key_value_store() -> Any:
    """The coordinator's key-value store, which every process can read and write."""
    return distributed.global_state.client


def slice_of_host(seconds: int) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """(HOST:PORT of process 0, processes, this one's number, ids of its devices) from a TPU slice's
    metadata, as jax.distributed.initialize finds it; None for unknown values.

    seconds: how long to wait for the metadata. Raises ValueError, RuntimeError or OSError if they
    are not available.
    """
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
    )
