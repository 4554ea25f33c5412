"""Saves checkpoints in the background (Orbax), and verifies them before they are restored.

    workdir/
      addressing/         what decides an address (addressing/artifact.py), one for the whole run
      checkpoints/
        1500/             one directory per step; appears by a rename when all in it is written
          state/          every array of the state in one flat namespace: "params/embedding", ...
            files.json    size and CRC-32 of every file of state/
          meta/metadata   JSON: step, losses, shapes, data iterators, fingerprint, and its CRC-32

A process killed at any moment leaves whole checkpoints and temporary directories, which the next
start removes. Anything else that is wrong with a directory is refused by name: nothing is ever
restored in part.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from engram_jax.addressing.artifact import Addressing
from engram_jax.checkpoint.arrays import (
    flatten,
    pad_host,
    restore_args,
    stored_shapes,
    without_elements,
)
from engram_jax.checkpoint.integrity import (
    FORMAT,
    IteratorState,
    OneLine,
    absolute,
    check_arrays,
    check_step,
    compare,
    decode_iterator,
    digest,
    gather_iterators,
    loss_in,
    loss_of,
    lowest,
    read_meta,
    seal,
    settle_addressing,
)
from engram_jax.checkpoint.orbax_internals import (
    TRACEBACKS,
    TRASH,
    UNRETRIEVED,
    LatestAndBest,
    StateHandler,
    is_read_in_pieces,
    open_manager,
    quiet_closed_loops,
    read_pieces,
    save_args,
)
from engram_jax.checkpoint.save_barrier import SaveBarrier
from engram_jax.config.errors import UserError
from engram_jax.distributed.consensus import agree, gather


@dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found.

    state: the arrays, in the abstract tree's structure.
    iterator, metrics, metadata: as they were given to `save` (tuples became lists); where the
      processes' iterators differed, this process's.
    digest: what this checkpoint is known by (`integrity.digest`).
    """

    step: int
    state: Any
    iterator: IteratorState
    metrics: dict[str, float | None]
    metadata: dict[str, Any]
    digest: str


class Checkpointer:
    """The checkpoints of one run. Every process of the run makes one and calls the same methods;
    what fails on one of them fails on all.

    workdir: the run's directory, local or anything else that etils.epath opens.
    addressing: the run's addressing, None for a model without memory. A new run stores it; what a
      run with checkpoints has stored must be the same (else UserError with both fingerprints).
    keep, keep_best: the latest `keep` checkpoints stay, and the `keep_best` of the lowest "loss".
    read_only: open to restore only; nothing is created, cleaned up or deleted.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        addressing: Addressing | None = None,
        keep: int = 3,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        root = absolute(workdir)
        self.directory = root / "checkpoints"
        self._fingerprint = addressing.fingerprint if addressing else None
        self._read_only = read_only
        self._losses: dict[int, float] = {}
        logging.getLogger("absl").addFilter(TRACEBACKS)
        logging.getLogger("asyncio").addFilter(UNRETRIEVED)
        quiet_closed_loops()
        agree(lambda: self._open(root, addressing))
        self._barrier = SaveBarrier()
        self._arrays = StateHandler(self._barrier)
        kept = LatestAndBest(self._loss_at, keep, keep_best)
        self._manager = open_manager(
            self.directory, self._arrays, self._barrier, kept, read_only=read_only
        )
        self._empty_trash()

    def _open(self, root: epath.Path, addressing: Addressing | None) -> None:
        if self._read_only and not self.directory.is_dir():
            raise UserError(f"workdir {root}: holds no checkpoints/; nothing was saved there")
        if not self._read_only:
            with OneLine(f"checkpoints {self.directory}: cannot be made"):
                self.directory.mkdir(parents=True, exist_ok=True)
        if addressing is not None:
            begun = any(path.name.isdigit() for path in self.directory.iterdir())
            settle_addressing(root / "addressing", addressing, begun, write=not self._read_only)

    def save(
        self,
        step: int,
        state: Any,
        *,
        true_rows: Mapping[str, int] | None = None,
        iterator: IteratorState = None,
        metrics: dict[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> bool:
        """Start to write a checkpoint; False if this step already has one.

        state: a pytree of jax and NumPy arrays. When this returns, its buffers may be donated or
          overwritten, though files are still being written.
        true_rows: path ("memory/1/rows") -> R, for arrays whose rows past R are padding: R are
          stored. The array on a mesh is sharded by rows, so that each process writes its own.
        iterator: the state of this process's data iterator; stored once if equal on all.
        metrics: "loss" ranks the checkpoints (absent or not finite: never the best).
        metadata: JSON values.

        Waits for the previous save first; raises UserError if that one failed.
        """
        if self._read_only:
            raise UserError(f"checkpoints {self.directory}: opened to restore only")
        self.wait()
        if step in self.steps():
            return False
        self._empty_trash()
        arrays = flatten(state)
        shapes = stored_shapes(arrays, true_rows)
        stored = {k: v for k, v in arrays.items() if math.prod(shapes[k])}
        self._arrays.stored_shapes = {k: shapes[k] for k in stored if shapes[k] != stored[k].shape}
        # All processes meet here: none still waits in the save before, whose keys `begin` deletes.
        iterators = gather_iterators(iterator)
        self._barrier.begin()
        meta = seal(
            {
                "format": FORMAT,
                "step": step,
                "addressing": self._fingerprint,
                "metrics": {k: _finite(v) for k, v in (metrics or {}).items()},
                "metadata": metadata or {},
                "iterators": iterators,
                "arrays": {k: [list(shapes[k]), v.dtype.name] for k, v in arrays.items()},
            }
        )
        self._losses[step] = loss_in(meta["content"])
        with OneLine(f"checkpoint {self.directory / str(step)}: cannot be written"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        stored, save_args={k: save_args(v) for k, v in stored.items()}
                    ),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        return True

    def restore(
        self,
        step: int | str | None,
        abstract_state: Any,
        *,
        true_rows: Mapping[str, int] | None = None,
        only: Callable[[str], bool] | None = None,
        whole: bool = True,
    ) -> Restored:
        """Read a checkpoint, bit for bit, onto the shardings asked for.

        step: a number, None for the latest, "best" for the lowest loss.
        abstract_state: the tree to fill, of jax.ShapeDtypeStruct (with a sharding or a Format;
          without: onto the default device) or of arrays (likewise; np.ndarray: onto the host).
        true_rows: path -> R, for arrays that have more rows than are stored; those become zeros.
        only: which paths to read, such as "params/embedding"; the other leaves stay as they were
          given. The whole tree is compared with the checkpoint nevertheless.
        whole: the checkpoint may hold nothing besides; False = the tree is a part of the state.

        Raises UserError, one line with the path and the reason, if there is no such checkpoint; if
        a file of it is missing, truncated or altered; if it belongs to another model, another
        addressing, or to processes whose data iterators differed and that were more or fewer. The
        line names the complete checkpoints beside.
        """
        self.wait()
        wanted = flatten(abstract_state)
        shapes = stored_shapes(wanted, true_rows)
        number, content = agree(lambda: self._examine(step, wanted, shapes, whole))
        path = self.directory / str(number)
        if len(seen := set(gather(str(number)))) > 1:
            raise UserError(
                f"checkpoints {self.directory}: processes see different latest steps,"
                f" {' and '.join(sorted(seen))}; all need the same directory"
            )
        read = {k for k in wanted if only is None or only(k)}
        targets = {k: v for k, v in wanted.items() if k in read and 0 not in shapes[k]}
        found = agree(
            lambda: self._read(path, targets, shapes, partial=not whole or len(read) < len(wanted))
        )

        def leaf(name: str, given: Any) -> Any:
            if name not in read:
                return given
            return pad_host(found[name], given) if name in targets else without_elements(given)

        leaves = [leaf(k, v) for k, v in wanted.items()]
        return Restored(
            step=number,
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), leaves),
            iterator=decode_iterator(content["iterators"]),
            metrics=content["metrics"],
            metadata=content["metadata"],
            digest=agree(lambda: digest(path, content)),
        )

    def _examine(
        self,
        step: int | str | None,
        wanted: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        whole: bool,
    ) -> tuple[int, dict[str, Any]]:
        """The number and the content of a checkpoint that may be read; see `restore`."""
        number = self._resolve(step)
        path = self.directory / str(number)
        try:
            content = read_meta(path)
            check_step(content, number)
            compare(content, wanted, shapes, self._fingerprint, whole)
            check_arrays(path, share=True)
        except UserError as error:
            raise UserError(f"checkpoint {path}: {error}; {self._others(number)}") from error
        return number, content

    def _read(
        self,
        path: epath.Path,
        targets: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        partial: bool,
    ) -> dict[str, Any]:
        # Not by the manager: after reading it waits for processes that may have failed.
        large = {k: v for k, v in targets.items() if is_read_in_pieces(v)}
        others = {k: v for k, v in targets.items() if k not in large}
        args = {k: restore_args(v, shapes[k]) for k, v in others.items()}
        asked = ocp.args.PyTreeRestore(
            others, restore_args=args, partial_restore=partial or bool(large)
        )
        with OneLine(f"checkpoint {path}: cannot be read"):
            # Orbax refuses to read nothing.
            found = self._arrays.restore(path / "state", args=asked) if others else {}
            return found | {k: read_pieces(path / "state", k, v) for k, v in large.items()}

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; the one being written counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the lowest "loss", None if no checkpoint has one."""
        return lowest({step: self._loss_at(step) for step in self.steps()})

    def metadata(self, step: int | str | None = None) -> dict[str, Any]:
        """The metadata given to `save`, without reading any array."""
        number = self._resolve(step)
        path = self.directory / str(number)
        try:
            return read_meta(path)["metadata"]
        except UserError as error:
            raise UserError(f"checkpoint {path}: {error}; {self._others(number)}") from error

    def wait(self) -> None:
        """Until the save under way is complete. Raises UserError if it failed."""
        with OneLine(f"checkpoints {self.directory}: the last save failed"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Complete the save under way and end all threads."""
        try:
            self.wait()
        except BaseException:
            with contextlib.suppress(Exception):  # the same failure again
                self._manager.close()
            raise
        with OneLine(f"checkpoints {self.directory}: cannot be closed"):
            self._manager.close()
            self._empty_trash()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resolve(self, step: int | str | None) -> int:
        steps = self.steps()
        if step is None or step == "best":
            number = self.latest_step() if step is None else self.best_step()
        else:
            number = int(step) if int(step) in steps else None
        if number is None:
            names = {"None": "the latest step", "best": "the step of the lowest loss"}
            there = f"there are steps {', '.join(map(str, steps))}" if steps else "there is none"
            wanted = names.get(str(step), f"step {step}")
            raise UserError(f"checkpoints {self.directory}: {wanted} was asked for; {there}")
        return number

    def _loss_at(self, step: int) -> float:
        if step not in self._losses:
            self._losses[step] = loss_of(self.directory / str(step))
        return self._losses[step]

    def _others(self, step: int) -> str:
        complete = []
        for other in self.steps():
            try:
                read_meta(self.directory / str(other))
                check_arrays(self.directory / str(other), share=False)
            except UserError:
                continue
            complete.append(str(other))
        others = [other for other in complete if other != str(step)]
        if not others:
            return "complete checkpoints beside it: none"
        go_on = ""
        if step > int(others[-1]):
            folder = self.directory / str(step)
            go_on = f"; to go on from step {others[-1]}, move {folder} away"
        return f"complete checkpoints beside it: {', '.join(others)}{go_on}"

    def _empty_trash(self) -> None:
        trash = self.directory / TRASH
        if not self._read_only and jax.process_index() == 0 and trash.exists():
            trash.rmtree()


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
