"""All use of Orbax's private interfaces.

The one file with private use of Orbax, and of the files it writes: handlers that are replaced in
part (`async_save`, `finalize`), when it calls them and its barrier, a policy of what is preserved,
its futures, the names and the layout of the files of a tree. None of it is promised to the next
release: pyproject.toml bounds orbax-checkpoint below the next minor one. Elsewhere only
`ocp.args` and the arguments of saving and restoring are used.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint._src.arrays.subchunking import choose_chunk_shape

from engram_jax.checkpoint.integrity import list_all, list_mine
from engram_jax.checkpoint.save_barrier import SaveBarrier

_PIECE, _SMALLEST_PIECE = 1 << 26, 1 << 16  # bytes
TRASH = "deleted"  # the folder of checkpoints that are being deleted


def open_manager(
    directory: epath.Path,
    state: StateHandler,
    barrier: SaveBarrier,
    preserved: LatestAndBest,
    *,
    read_only: bool,
) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in `directory`, each an item "state" and a JSON "meta".

    read_only: what a killed process left half written stays.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, state)
    registry.add("meta", ocp.args.JsonSave, MetaHandler(barrier))
    return ocp.CheckpointManager(
        directory,
        handler_registry=registry,
        options=ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=not read_only,
            preservation_policy=preserved,
            # A rename is atomic, a deletion is not: interrupted, it leaves what looks whole.
            todelete_subdir=TRASH,
            lightweight_initialize=True,
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(barrier_sync_fn=barrier),
        ),
    )


def save_args(array: jax.Array | np.ndarray) -> ocp.SaveArgs:
    """How an array is divided: each device's part into pieces of at most 64 MiB, which are
    compressed, and read, at once. Orbax divides by divisors; where that would make pieces below
    64 KiB (of a prime number of rows: single rows), a part stays whole, for a piece costs 3 KB of
    memory while it is written."""
    part = array.shape if isinstance(array, np.ndarray) else array.sharding.shard_shape(array.shape)
    size = array.dtype.itemsize
    if math.prod(part) * size <= _PIECE:
        return ocp.SaveArgs()
    piece = choose_chunk_shape(array.shape, part, array.dtype, _PIECE, shard_axes=())
    small = math.prod(piece) * size < _SMALLEST_PIECE
    return ocp.SaveArgs(chunk_byte_size=None if small else _PIECE)


class StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler for trees of arrays, which also lists what has been written in files.json.

    stored_shapes: of the arrays that are stored smaller than they are, set before every save.
    """

    def __init__(self, barrier: SaveBarrier):
        super().__init__()
        self._barrier = barrier
        self.stored_shapes: dict[str, tuple[int, ...]] = {}

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(directory, *args, **kwargs)
        return [_Written(futures or [], self._barrier, lambda: list_mine(directory, _own))]

    def finalize(self, directory: epath.Path) -> None:
        """Called by one process, when all have written and before the checkpoint is visible."""
        try:
            super().finalize(directory)
            crop(directory, self.stored_shapes)
            list_all(directory)
        except BaseException as error:
            self._barrier.fail(error)
            raise


class MetaHandler(ocp.JsonCheckpointHandler):
    """Orbax's handler for JSON; a process that cannot write it does not let the others wait."""

    def __init__(self, barrier: SaveBarrier):
        super().__init__()
        self._barrier = barrier

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [_Written(await super().async_save(*args, **kwargs) or [], self._barrier)]


class _Written:
    """An Orbax future: `futures`, then `afterwards`; the other processes learn of a failure."""

    def __init__(
        self,
        futures: list[Any],
        barrier: SaveBarrier,
        afterwards: Callable[[], None] = lambda: None,
    ):
        self._chain = ocp.future.ChainedFuture(futures, afterwards)
        self._barrier = barrier

    def result(self, timeout: float | None = None) -> None:
        try:
            self._chain.result(timeout)
        except BaseException as error:
            self._barrier.fail(error)
            raise

    def cancel(self) -> None:
        self._chain.cancel()


@dataclass
class LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Orbax's own BestN knows the losses only as long as the process lives, or reads every file."""

    loss_at: Callable[[int], float]
    keep: int
    keep_best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        ranked = sorted((self.loss_at(s), s) for s in steps)
        kept = {s for loss, s in ranked[: self.keep_best] if loss < math.inf}
        kept.update(sorted(steps)[-self.keep :])
        return [s in kept for s in steps]


def crop(directory: epath.Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give stored arrays smaller bounds; by one process, after all have written.

    directory: where Orbax has written one OCDBT store. shapes: the new shape by array name.
    """
    for name, shape in shapes.items():
        _opened(directory, name).resize(exclusive_max=list(shape), shrink_only=True).result()


def is_read_in_pieces(target: Any) -> bool:
    """Whether `read_pieces` reads an array: a large one, of rows, onto one device."""
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct) or target.sharding is None:
        return False
    size = math.prod(target.shape) * target.dtype.itemsize
    return target.ndim > 1 and size > 2 * _PIECE and target.sharding.num_devices == 1


def read_pieces(directory: epath.Path, name: str, target: Any) -> jax.Array:
    """A stored array as `target`, rows that are not stored being zeros: piece by piece, for Orbax
    has all of it on the host and on the device for a while, which on a CPU is twice."""
    where = target.sharding if target.format.layout is None else target.format
    array = _opened(directory, name)
    rows = max(1, _PIECE // (math.prod(target.shape[1:]) * target.dtype.itemsize))
    create = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=where)
    put = jax.jit(
        lambda whole, piece, at: jax.lax.dynamic_update_slice_in_dim(whole, piece, at, axis=0),
        donate_argnums=0,
        out_shardings=where,
    )
    found = create()
    for at in range(0, array.shape[0], rows):
        piece = array[at : min(at + rows, array.shape[0])].read().result()
        found = jax.block_until_ready(put(found, piece, at))
    return found


def _opened(directory: epath.Path, name: str) -> ts.TensorStore:
    """A stored array. directory: where Orbax has written one OCDBT store."""
    if "://" in (path := directory.as_posix()):
        base: Any = f"{path}/"
    else:
        base = {"driver": "file", "path": f"{path}/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return ts.open({"driver": "auto", "kvstore": store}).result()


def _own(folder: str) -> bool:
    """Whether a folder of a checkpoint, ocdbt.process_3, is what this process writes."""
    return folder == f"ocdbt.process_{jax.process_index()}"


def quiet_closed_loops() -> None:
    """Print nothing of what is left of a save that has failed and is over: tracebacks of
    Tensorstore's threads, which tell its event loop (hundreds where a disk is full), and warnings
    of the files that it did not come to. The save's own error says why."""
    warnings.filterwarnings(
        "ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning
    )
    before = sys.unraisablehook
    if getattr(before, "quiet_closed_loops", False):
        return

    def hook(raised: Any) -> None:
        closed = raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
        if not (closed and raised.object is None):  # None: C++ met it, not a destructor in Python
            before(raised)

    hook.quiet_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


class _OrbaxTracebacks(logging.Filter):
    """Drops the tracebacks that Orbax logs of exceptions it also raises."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


class _Unretrieved(logging.Filter):
    """Drops what asyncio logs of the other files' errors of a save that one file has ended."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("exception was never retrieved" in text and "OCDBT" in text)


TRACEBACKS, UNRETRIEVED = _OrbaxTracebacks(), _Unretrieved()
