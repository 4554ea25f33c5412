"""The training loop: data, metrics, evaluation, checkpoints and stopping between the steps.

The loop dispatches step t before it reads the metrics of step t - 1, so the device never waits for
the host to read numbers; every transfer in it is explicit.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.run_record import add_launch
from engram_jax.checkpoint.run_settings import Changes
from engram_jax.checkpoint.run_tokenizer import save_text_side
from engram_jax.checkpoint.workdir import check_writable, locked
from engram_jax.config import Config
from engram_jax.config.difference import flat
from engram_jax.config.errors import UserError
from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import RunData, open_on_all_processes
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree
from engram_jax.distributed.preemption import Preemption
from engram_jax.evaluation.held_out import Evaluator, check_held_out
from engram_jax.evaluation.tasks import check_off
from engram_jax.evaluation.trajectories import Trajectory, open_trajectories
from engram_jax.hardware.cores import cores
from engram_jax.hardware.memory import all_devices_bytes, machine_bytes
from engram_jax.hardware.storage import replacing
from engram_jax.model.memory_needs import WORKER, check_training
from engram_jax.model.transformer import moe_layers
from engram_jax.monitoring.loggers import check_loggers
from engram_jax.monitoring.metrics import MetricsWriter, Progress
from engram_jax.monitoring.provenance import process_name
from engram_jax.report.write import no_pictures
from engram_jax.run.ancestry import (
    Ancestor,
    find_ancestor,
    other_text,
    start_from,
    with_ancestors_addresses,
    with_tokenizer,
)
from engram_jax.run.end_of_run import check_samples, end_run
from engram_jax.run.exchange_capacity import with_planned_exchange
from engram_jax.run.monitors import Monitors
from engram_jax.run.resume import (
    check_resumed,
    check_resumed_text,
    check_resumed_tokenizer,
    forget_unsaved,
)
from engram_jax.training.state import (
    TrainingProgram,
    TrainState,
    abstract_state,
    build_training,
    check_fits,
    check_trained,
    create_state,
)
from engram_jax.training.step import jit_train_step, jit_utilisation


@dataclass
class Pending:
    """A dispatched step with unread metrics, and what must be saved if they are not finite."""

    step: int
    metrics: dict[str, Any]
    batch: dict[str, Any]
    iterator_before: Any


def train(
    config: Config,
    workdir: Path,
    log: Callable[[str], None] = processes.log,
    profile: tuple[int, int] | None = None,
    accept: Sequence[str] = (),
) -> TrainState:
    """Train to `config.train.steps`, resuming from the newest checkpoint in `workdir` if any.

    profile: (START, STOP), the steps to record; see monitoring/profiling.py.
    accept: keys or sections of the configuration in which it may differ from the one that the run
      in `workdir` was trained with (run/resume.py).

    After SIGTERM the current step is finished and its state saved and returned, without a report
    (distributed/preemption.py; SystemExit(0) if the signal came before or after the loop).
    Raises UserError for what the user can correct: unusable data, other settings than those of the
    run in `workdir`, another run's checkpoint, a loss that is no longer finite (the state before
    that step is then saved as a checkpoint, and the batch in a file).
    """
    launch = Launch(config, workdir, log, tuple(accept), profile, time.monotonic())
    with Preemption(log) as preemption:
        return _train(launch, preemption)


@dataclass(frozen=True)
class Launch:
    """The arguments of one call of `train`. started: time.monotonic() at its start, None: now."""

    config: Config
    workdir: Path
    log: Callable[[str], None] = processes.log
    accept: tuple[str, ...] = ()
    profile: tuple[int, int] | None = None
    started: float | None = None


def _train(launch: Launch, preemption: Preemption) -> TrainState:
    config, workdir, log = launch.config, launch.workdir, launch.log
    if config.data.tasks.names:
        check_off(config)
    check_loggers(config.train.loggers)
    check_trained(config)
    agree(lambda: check_writable(workdir))
    agree(lambda: check_training(config, all_devices_bytes(), machine_bytes()))
    changes = agree(lambda: check_resumed(config, workdir, launch.accept, log))
    warn_of_settings(config)
    ancestor = agree(lambda: find_ancestor(config, workdir, launch.accept))
    config = with_tokenizer(config, workdir)
    launch = dataclasses.replace(launch, config=config)
    data = open_on_all_processes(config, log, count_fgrams=not config.train.init_from)
    data = agree(lambda: with_ancestors_addresses(data, config, workdir))
    agree(lambda: check_resumed_text(workdir, data.prepared.summary()))
    agree(lambda: check_resumed_tokenizer(config, workdir, data.prepared.tokenizer))
    if ancestor is not None and (warning := other_text(ancestor, data.prepared.summary())):
        processes.warn(warning)
    agree(lambda: check_samples(config, data.prepared.tokenizer))
    agree(lambda: check_held_out(data, config.train.eval_batches))
    trajectories = open_trajectories(config, data, log)
    program = build_training(config, data.addressing)
    agree(lambda: check_fits(program))
    program = with_planned_exchange(program, data, log)
    if without := no_pictures():
        log(without)
    with locked(workdir):
        with (
            preemption.deferred(),
            Checkpointer(
                workdir,
                addressing=data.addressing,
                keep=config.train.keep,
                keep_best=config.train.keep_best,
            ) as checkpointer,
        ):
            run = Run(
                *(launch, data, program, checkpointer, preemption, changes, ancestor),
                trajectories=trajectories,
            )
            state = run.loop()
        if preemption.stopped:
            return state
        end_run(config, workdir, data, run.evaluator, state, log)
    return state


def warn_of_settings(config: Config) -> None:
    """Tell of settings that are possible, and hardly meant."""
    steps, warmup = config.train.steps, config.optimizer.warmup_steps
    if warmup > steps:
        processes.warn(
            f"config.optimizer.warmup_steps = {warmup}: the run ends in its warm-up, after"
            f" config.train.steps = {steps}; the learning rate never reaches its peak"
        )
    if config.data.workers > cores():
        processes.warn(
            f"config.data.workers = {config.data.workers}: there are {cores()} cores, and each"
            f" worker takes about {WORKER / 1e6:.0f} MB of memory"
        )


class Run:
    """One launch of a training run.

    changes: to the settings since the previous launch. ancestor: the checkpoint that a new run
    starts from, None = its seed. trajectories: further texts that are scored between steps.
    """

    def __init__(
        self,
        launch: Launch,
        data: RunData,
        program: TrainingProgram,
        checkpointer: Checkpointer,
        preemption: Preemption | None = None,
        changes: Changes | None = None,
        ancestor: Ancestor | None = None,
        trajectories: Sequence[Trajectory] = (),
    ):
        self.config, self.workdir, self.log = launch.config, launch.workdir, launch.log
        self.preemption = preemption or Preemption(self.log)  # not entered: handles no signal
        self.started = launch.started or time.monotonic()
        self.program, self.checkpointer = program, checkpointer
        self.iterator = data.train_iterator(program.mesh)
        self.state, origin = self._start(ancestor)
        self.first_step = int(self.state.step)
        self.writer = agree(lambda: self._records(data, changes or {}, origin))
        self.evaluator = Evaluator(program, data)
        self.trajectories = trajectories
        self.utilisation = jit_utilisation(program)
        self.monitors = Monitors(
            self.config,
            self.workdir,
            first_step=self.first_step,
            started=launch.started,
            profile=launch.profile,
            log=self.log,
        )

    def _records(
        self, data: RunData, changes: Changes, origin: dict[str, Any] | None
    ) -> MetricsWriter:
        """Write the workdir's records before the first step (on process 0)."""
        if self.fresh and jax.process_index() == 0:
            forget_unsaved(self.config, self.workdir)
        add_launch(
            self.workdir,
            self.config,
            data.prepared.summary(),
            resumed_at=self.first_step,
            changed_settings=changes,
            initialised_from=origin,
        )
        save_text_side(self.workdir, data.prepared, self.config)
        return MetricsWriter(
            self.workdir,
            start_step=self.first_step,
            loggers=self.config.train.loggers,
            config=flat(self.config),
        )

    def _start(self, ancestor: Ancestor | None) -> tuple[TrainState, dict[str, Any] | None]:
        """A new state, or the newest checkpoint's with the data iterator set to continue it; and
        the origin of a new one that is not from the seed."""
        latest = self.checkpointer.latest_step()
        self.fresh = latest is None
        if latest is None and ancestor is not None:
            return start_from(self.program, ancestor, self.log)
        if latest is None:
            return create_state(self.program), None
        self._stage(f"reading checkpoint {latest}")
        restored = table_order.restore(
            self.program, self.checkpointer, latest, abstract_state(self.program)
        )
        self.iterator.set_state(cast(dict[str, Any], restored.iterator))
        self.log(f"resumed from step {latest} in {self.workdir}")
        return restored.state, None

    def _stage(self, line: str) -> None:
        """Log what takes a while before the first step, with the seconds since the start."""
        self.log(f"[{time.monotonic() - self.started:5.1f} s] {line}")

    def loop(self) -> TrainState:
        """Train to the last step, or until SIGTERM; returns the state, saved as a checkpoint."""
        total, rates = self.config.train.steps, self.monitors.rates
        progress = Progress(total, start=self.first_step, rates=rates)
        with closing(self.iterator), self.writer, closing(progress), self.monitors:
            self._steps(progress)
        return self.state

    def _steps(self, progress: Progress) -> None:
        train, total = self.config.train, self.config.train.steps
        step_fn = jit_train_step(self.program)
        pending: Pending | None = None
        for step in range(self.first_step, total):
            if self.preemption.agreed():
                self._preempted(step, pending, progress)
                return
            if step == self.first_step:
                self._stage("compiling the training step")
            self.monitors.begin(step)
            before = copy.deepcopy(self.iterator.get_state())
            host_batch = next(self.iterator)
            batch = place_batch(self.program.mesh, host_batch, self.config.data.batch_size)
            annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            with annotation, jax.transfer_guard("disallow"):
                self.state, metrics = step_fn(self.state, batch)
            if pending is not None:
                self._read(pending, progress)
            pending = Pending(step, metrics, host_batch, before)
            done = step + 1
            evaluate = done % train.eval_every == 0 or done == total
            save = evaluate or done % train.checkpoint_every == 0
            due = [each for each in self.trajectories if each.due(done, total)]
            if save or due or self.monitors.at_edge(done):
                self._read(pending, progress)
                pending = None
                self.monitors.end(done)
            if due:
                with self.monitors.pause(done, saves=False):
                    for each in due:
                        self.writer.write(done, each.score(self.evaluator, self.state))
            if save:
                with self.monitors.pause(done):
                    self._pause(done, evaluate, progress)
        if self.preemption.agreed(wait=True):  # SIGTERM during the last step
            self._preempted(total, None, progress)

    def _read(self, pending: Pending, progress: Progress) -> None:
        """Fetch a finished step's metrics; log them when due; stop if they are not finite."""
        values = jax.device_get(pending.metrics)
        if not values["finite"]:
            self._halt(pending, values)
        step = pending.step + 1
        self.monitors.finished(step)
        progress.update(step, loss=float(values["loss"]))
        if step % self.config.train.log_every == 0 or step == 1:
            self.writer.write(step, {**self._named(values), **self.monitors.rates()})

    def _pause(self, step: int, evaluate: bool, progress: Progress) -> None:
        """Evaluate and save between two steps."""
        metrics = {}
        if evaluate:
            score = self.evaluator.score(self.state, self.config.train.eval_batches)
            metrics["loss"] = score.loss
            used = jax.device_get(self.utilisation(self.state.memory))
            extra = {f"utilisation/{k}": float(v) for k, v in used.items()}
            if self.state.average is not None:
                averaged = self.program.averaged(self.state)
                of_average = self.evaluator.score(averaged, self.config.train.eval_batches)
                extra["validation_loss_ema"] = of_average.loss
            self.writer.write(
                step, {"validation_loss": score.loss, "validation_targets": score.targets, **extra}
            )
            progress.note(f"step {step}: validation loss {score}")
        table_order.save(
            self.program,
            self.checkpointer,
            step,
            self.state,
            iterator=self.iterator.get_state(),
            metrics=metrics,
            metadata=self._about(),
        )

    def _about(self) -> dict[str, Any]:
        """A checkpoint's metadata about its run (read by checkpoint/load_model.py)."""
        return {"config": self.config.name, "seq_len": self.config.data.seq_len}

    def _preempted(self, step: int, pending: Pending | None, progress: Progress) -> None:
        """Save the state after `step` steps, unless this launch began there, and log it."""
        if pending is not None:
            self._read(pending, progress)
        if step > self.first_step:
            with self.monitors.pause(step):
                self._pause(step, False, progress)
                self.checkpointer.wait()
        saved = "checkpoint" if step > self.first_step else "nothing new to save; step"
        line = f"stopped, {saved} {step} in {self.workdir}; the same command goes on"
        self.log(f"{self.preemption.signal}: {line}")

    def _halt(self, pending: Pending, values: dict[str, Any]) -> None:
        """Save the state before the bad step and its batch, then raise UserError."""
        of = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.workdir / f"bad_batch_step_{pending.step}{of}.npz"
        arrays: dict[str, Any] = {k: v for k, v in pending.batch.items() if k != "addresses"}
        with replacing(path, shared=False) as file:
            np.savez_compressed(file, **arrays)
        going = jax.device_put(np.zeros((), bool), self.state.halted.sharding)
        state = dataclasses.replace(self.state, halted=going)
        with self.monitors.pause(pending.step):
            table_order.save(
                self.program,
                self.checkpointer,
                pending.step,
                state,
                iterator=pending.iterator_before,
                metadata=self._about(),
            )
        raise UserError(
            f"step {pending.step}: loss {float(values['loss'])}, gradient norm"
            f" {float(values['grad_norm'])} on {process_name()}: not finite; the state"
            f" before this step is checkpoint {pending.step} in {self.workdir}, its batch"
            f" {path.name}"
        )

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        """Step metrics under the names they are logged with, layers by their ids."""
        out = dict(values)
        out.pop("finite")
        loads = np.asarray(out.pop("load"))
        for layer, load in zip(moe_layers(self.config.model), loads, strict=True):
            out[f"expert_load/{layer}"] = load / np.maximum(load.sum(), 1)
        return out
