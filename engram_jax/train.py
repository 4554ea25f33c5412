"""The training loop: what happens between two steps, and nothing of what happens inside one.

The loop dispatches step t before it reads the metrics of step t - 1, so the device never waits for
the host to look at numbers; every transfer in it is explicit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from engram_jax import provenance
from engram_jax.checkpoint import Checkpointer
from engram_jax.config import Config
from engram_jax.errors import UserError
from engram_jax.evaluate import Evaluator
from engram_jax.finish import check_samples, finish
from engram_jax.metrics import MetricsWriter, Progress
from engram_jax.restore import save_text_side
from engram_jax.run_data import RunData, open_data, place_batch
from engram_jax.train_state import (
    Program,
    TrainState,
    abstract_state,
    build_program,
    check_memory,
    create_state,
)
from engram_jax.train_step import jit_train_step, utilisation
from engram_jax.workdir import check_writable, held


@dataclass
class Pending:
    """A dispatched step whose metrics nobody has read yet, and what is needed if it went wrong."""

    step: int
    metrics: dict[str, Any]
    batch: dict[str, Any]
    iterator_before: Any


def train(config: Config, workdir: Path, log: Callable[[str], None] = print) -> TrainState:
    """Train to `config.train.steps`, resuming from the newest checkpoint in `workdir` if any.

    Raises UserError for what the user can mend: unusable data, a foreign checkpoint, a loss that is
    no longer finite (the state before that step is then a checkpoint, and the batch a file).
    """
    check_writable(workdir)
    data = open_data(config, log)
    check_samples(config, data.prepared.tokenizer)
    program = build_program(config, data.addressing)
    check_memory(program)
    with held(workdir):
        with Checkpointer(
            workdir,
            addressing=data.addressing,
            keep=config.train.keep,
            keep_best=config.train.keep_best,
        ) as checkpointer:
            run = Run(config, workdir, data, program, checkpointer, log)
            state = run.loop()
        finish(config, workdir, data, run.evaluator, state, log)
    return state


class Run:
    """One launch of a training run."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: RunData,
        program: Program,
        checkpointer: Checkpointer,
        log: Callable[[str], None],
    ):
        self.config, self.workdir, self.log = config, workdir, log
        self.program, self.checkpointer = program, checkpointer
        self.iterator = data.train_iterator(program.mesh)
        self.state = self._start()
        self.first_step = int(self.state.step)
        provenance.record(workdir, config, resumed_at=self.first_step)
        save_text_side(workdir, data.prepared)
        self.evaluator = Evaluator(program, data)
        self.writer = MetricsWriter(workdir, start_step=self.first_step)

    def _start(self) -> TrainState:
        """A fresh state, or the newest checkpoint's with the data iterator set to continue it."""
        latest = self.checkpointer.latest_step()
        if latest is None:
            return create_state(self.program)
        restored = self.checkpointer.restore(latest, abstract_state(self.program))
        self.iterator.set_state(cast(dict[str, Any], restored.iterator))
        self.log(f"resumed from step {latest} in {self.workdir}")
        return restored.state

    def loop(self) -> TrainState:
        """Train to the last step; returns the state after it (which is also a checkpoint)."""
        tokens = self.config.data.batch_size * self.config.data.seq_len
        total = self.config.train.steps
        progress = Progress(total, start=self.first_step, tokens_per_step=tokens)
        with self.writer, closing(progress):
            self._steps(progress)
        return self.state

    def _steps(self, progress: Progress) -> None:
        train, total = self.config.train, self.config.train.steps
        step_fn = jit_train_step(self.program)
        pending: Pending | None = None
        for step in range(self.first_step, total):
            before = copy.deepcopy(self.iterator.get_state())
            host_batch = next(self.iterator)
            batch = place_batch(self.program.mesh, host_batch, self.config.data.batch_size)
            with jax.transfer_guard("disallow"):
                self.state, metrics = step_fn(self.state, batch)
            if pending is not None:
                self._read(pending, progress)
            pending = Pending(step, metrics, host_batch, before)
            done = step + 1
            evaluate = done % train.eval_every == 0 or done == total
            if evaluate or done % train.checkpoint_every == 0:
                self._read(pending, progress)
                pending = None
                self._pause(done, evaluate, progress)

    def _read(self, pending: Pending, progress: Progress) -> None:
        """Fetch a finished step's metrics; log them when due; stop if they are not finite."""
        values = jax.device_get(pending.metrics)
        if not values["finite"]:
            self._halt(pending, values)
        step = pending.step + 1
        progress.update(step, loss=float(values["loss"]))
        if step % self.config.train.log_every == 0 or step == 1:
            self.writer.write(step, {**_named(values), **progress.rates()})

    def _pause(self, step: int, evaluate: bool, progress: Progress) -> None:
        """Evaluate and save between two steps."""
        metrics = {}
        if evaluate:
            loss = self.evaluator.loss(self.state, self.config.train.eval_batches)
            metrics["loss"] = loss
            used = jax.device_get(jax.jit(utilisation)(self.state.memory))
            extra = {f"utilisation/{k}": float(v) for k, v in used.items()}
            self.writer.write(step, {"validation_loss": loss, **extra})
            progress.note(f"step {step}: validation loss {loss:.4f}")
        self.checkpointer.save(
            step,
            self.state,
            iterator=self.iterator.get_state(),
            metrics=metrics,
            metadata={"config": self.config.name},
        )

    def _halt(self, pending: Pending, values: dict[str, Any]) -> None:
        """Keep the state before the bad step, the batch and the numbers; then stop."""
        path = self.workdir / f"bad_batch_step_{pending.step}.npz"
        arrays: dict[str, Any] = {k: v for k, v in pending.batch.items() if k != "addresses"}
        np.savez_compressed(path, **arrays)
        state = TrainState(**{**vars(self.state), "halted": jax.device_put(np.zeros((), bool))})
        self.checkpointer.save(pending.step, state, iterator=pending.iterator_before)
        raise UserError(
            f"step {pending.step}: loss {float(values['loss'])}, gradient norm"
            f" {float(values['grad_norm'])} on process {jax.process_index()}: not finite; the state"
            f" before this step is checkpoint {pending.step} in {self.workdir}, its batch"
            f" {path.name}"
        )


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """Step metrics under the names they are logged by."""
    out = dict(values)
    out.pop("finite")
    load = np.asarray(out.pop("load"))
    if load.size:
        out["expert_load"] = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    return out
