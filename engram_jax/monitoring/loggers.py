"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow (`train.loggers`).

A logger has two methods:

    log(found)    what was measured (`Measured`)
    close()

A run that is resumed goes on in the same run of a service: its id is kept in the workdir. Services
take their address and project from their own environment variables (WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, ...); without them W&B's project is "engram_jax", and MLflow writes to the
folder `mlflow` of the workdir. What a killed launch logged of steps that are made again is the same
numbers: TensorBoard forgets it, W&B keeps the first, MLflow has both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engram_jax.config import MLFLOW, TENSORBOARD, WANDB
from engram_jax.config.errors import UserError
from engram_jax.config.extras import require
from engram_jax.hardware.storage import write_text
from engram_jax.monitoring.tensorboardx_internals import survive_a_full_disk

_WANDB_ID, _MLFLOW_ID = "wandb_run_id.txt", "mlflow_run_id.txt"


@dataclass(frozen=True)
class Measured:
    """The numbers of a step. histograms: name -> float64 [n]. now: seconds since the epoch."""

    step: int
    scalars: Mapping[str, float]
    histograms: Mapping[str, np.ndarray]
    now: float


class Logger(Protocol):
    """See the module."""

    def log(self, found: Measured) -> None: ...

    def close(self) -> None: ...


def check_loggers(names: tuple[str, ...]) -> None:
    """Raises UserError for a logger whose package is not installed."""
    for name in names:
        if name != TENSORBOARD:
            require(name, f"config.train.loggers = {name!r}")


def open_loggers(
    names: tuple[str, ...], workdir: Path, start_step: int, config: Mapping[str, Any]
) -> list[Logger]:
    """The loggers of these names, for a launch from `start_step`. config: shown with the run.

    Raises UserError, naming the logger, where a service cannot be reached.
    """
    check_loggers(names)
    opened: list[Logger] = []
    for name in names:
        try:
            opened.append(_OPEN[name](workdir, start_step, config))
        except Exception as error:  # whatever a service's client raises
            for each in opened:
                each.close()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"config.train.loggers = {name!r}: {lines[0][:300]}") from error
    return opened


class TensorBoard:
    """Curves and histograms in `workdir`/tensorboard."""

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        del config  # it stands in run.json and the report
        self._board = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=start_step + 1,
            flush_secs=10,
            filename_suffix=f".{start_step}",  # else one begun in the same second takes its file
        )
        survive_a_full_disk(self._board)

    def log(self, found: Measured) -> None:
        for name, value in found.scalars.items():
            self._board.add_scalar(name, value, found.step, found.now)
        for name, values in found.histograms.items():
            self._board.add_histogram(name, values, found.step, walltime=found.now)

    def close(self) -> None:
        self._board.close()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline writes to `workdir`/wandb alone."""

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]):
        import wandb

        del start_step
        self._wandb = wandb
        kept = workdir / _WANDB_ID
        begun = kept.read_text().strip() if kept.is_file() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "engram_jax"),
            name=os.environ.get("WANDB_NAME", workdir.resolve().name),
            id=begun,
            resume="allow" if begun else None,
            dir=str(workdir),
            config=dict(config),
        )
        if begun is None:
            write_text(kept, f"{self._run.id}\n")

    def log(self, found: Measured) -> None:
        shown = {name: self._wandb.Histogram(values) for name, values in found.histograms.items()}
        self._run.log({**found.scalars, **shown}, step=found.step)  # W&B stamps the time

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow's tracking; of histograms it has minimum, mean and maximum."""

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        del start_step
        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            database = (workdir / "mlflow").absolute()
            database.mkdir(parents=True, exist_ok=True)
            address = f"sqlite:///{database / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=address)
        kept = workdir / _MLFLOW_ID
        if kept.is_file():
            self._id = kept.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "engram_jax")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(number, run_name=workdir.resolve().name)
        self._id = run.info.run_id
        parameters = [Param(key, str(value)[:500]) for key, value in config.items()]
        for first in range(0, len(parameters), 100):  # as many as a request may have
            self._client.log_batch(self._id, params=parameters[first : first + 100])
        write_text(kept, f"{self._id}\n")

    def log(self, found: Measured) -> None:
        values = dict(found.scalars)
        for name, each in found.histograms.items():
            shown = (("min", each.min()), ("mean", each.mean()), ("max", each.max()))
            values |= {f"{name}/{what}": float(value) for what, value in shown}
        when = int(1000 * found.now)
        metrics = [self._metric(name, value, when, found.step) for name, value in values.items()]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)


_OPEN: dict[str, Any] = {TENSORBOARD: TensorBoard, WANDB: Wandb, MLFLOW: Mlflow}
