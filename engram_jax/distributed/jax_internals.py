"""What of several processes JAX has no public name for: the coordinator's store, a host's slice.

The one file with private use of jax. None of it is promised to the next release: pyproject.toml
bounds jax below the next minor one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jax._src import clusters, distributed


def key_value_store() -> Any:
    """The coordinator's store, which every process can read and write."""
    return distributed.global_state.client


def slice_of_host(seconds: int) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """(HOST:PORT of process 0, processes, which this is, ids of its devices) as a TPU slice's own
    metadata says, and as jax.distributed.initialize finds it; None for what is not known.

    seconds: how long to wait for the metadata. Raises ValueError, RuntimeError or OSError if they
    cannot be had.
    """
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
    )
