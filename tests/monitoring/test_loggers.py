"""Loggers beside metrics.jsonl, read back by the services' own readers, all offline.

The packages are extras; a test without its package is skipped, and what a missing one tells is
tested where it is missing.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.monitoring.loggers import check_loggers, open_loggers
from engram_jax.monitoring.metrics import MetricsWriter, read_metrics, shown

VALUES = {"loss": np.float32(2.5), "gate/1": np.array([0.25, 0.5]), "load": np.arange(20.0)}


def written(workdir: Path, logger: str, steps, **how) -> None:
    with MetricsWriter(workdir, loggers=(logger,), config={"train.seed": 7}, **how) as writer:
        for step in steps:
            writer.write(step, {**VALUES, "loss": 1.0 / step})


def test_arrays_become_curves_or_histograms():
    scalars, histograms = shown({**VALUES, "broken": np.full(20, np.nan)})
    assert scalars == {"loss": 2.5, "gate/1/0": 0.25, "gate/1/1": 0.5}
    assert list(histograms) == ["load"] and histograms["load"].shape == (20,)


def test_no_logger_at_all(tmp_path):
    with MetricsWriter(tmp_path, loggers=()) as writer:
        writer.write(1, VALUES)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path)[0]["loss"] == 2.5


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_before_anything(name, tmp_path):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UserError, match=f"config.train.loggers = '{name}': needs the extra"):
        check_loggers(("tensorboard", name))
    with pytest.raises(UserError, match=rf"{name} is not installed \(pip install"):
        open_loggers((name,), tmp_path, 0, {})
    assert list(tmp_path.iterdir()) == []


def stored_records(file: Path):
    """The records of a .wandb file: LevelDB's log format (crc32, size and type before each piece,
    in blocks of 32 KiB) after a header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Its own file of the run has every value, and a second launch goes on in the same run."""
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    written(tmp_path, "wandb", [1, 2])
    kept = (tmp_path / "wandb_run_id.txt").read_text().strip()
    written(tmp_path, "wandb", [3], start_step=2)
    assert (tmp_path / "wandb_run_id.txt").read_text().strip() == kept
    found, ids, config = {}, set(), {}
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in stored_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if kind == "history":
                row = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                found[row["_step"]] = row
    assert ids == {kept} and config["train.seed"] == 7
    assert {step: row["loss"] for step, row in found.items()} == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert found[2]["gate/1/1"] == 0.5 and "load" in str(found[2])


@pytest.mark.slow
def test_mlflow_in_the_workdir(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra `mlflow` is not installed")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    written(tmp_path, "mlflow", [1, 2])
    written(tmp_path, "mlflow", [3], start_step=2)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("engram_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (tmp_path / "mlflow_run_id.txt").read_text().strip()
    assert run.info.status == "FINISHED" and run.data.params == {"train.seed": "7"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {m.step: m.value for m in history} == {1: 1.0, 2: 0.5, 3: 1 / 3}
    last = run.data.metrics
    assert last["gate/1/0"] == 0.25 and last["load/max"] == 19 and last["load/mean"] == 9.5


def test_a_service_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://host/x")
    with pytest.raises(UserError, match=r"config\.train\.loggers = 'mlflow': ") as error:
        MetricsWriter(tmp_path, loggers=("tensorboard", "mlflow"))
    assert "\n" not in str(error.value)
