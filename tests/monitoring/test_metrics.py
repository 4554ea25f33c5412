"""metrics.jsonl, TensorBoard files and progress, read back by other code than wrote them."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from engram_jax.monitoring.metrics import MetricsWriter, Progress, read_metrics


def lines(workdir: Path) -> list[dict]:
    def forbid(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=forbid) for line in text.splitlines()]


def events(workdir: Path):
    """(step, tag, value or None for a histogram) of all TensorBoard files, in order."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                scalar = value.simple_value if value.HasField("simple_value") else None
                found.append((event.step, value.tag, scalar))
    return found


def test_a_line_per_write_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    load = np.linspace(0, 1, 40).reshape(2, 20)
    writer.write(10, {"loss": jnp.float32(2.5), "rows": np.int32(7), "load": load})
    writer.write(20, {"loss": 2.25})
    first, second = lines(tmp_path)  # the writer is still open
    assert first.keys() == {"step", "time", "loss", "rows", "load"}
    assert (first["step"], first["loss"], first["rows"]) == (10, 2.5, 7)
    assert first["load"] == load.tolist()
    assert second["loss"] == 2.25
    assert second["time"] >= first["time"]
    writer.close()


def test_not_finite_values_stay_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": -math.inf, "c": np.array([1.0, math.inf, math.nan])})
    (record,) = lines(tmp_path)
    assert (record["a"], record["b"], record["c"]) == ("NaN", "-Infinity", [1, "Infinity", "NaN"])
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert record["b"] == -math.inf
    np.testing.assert_array_equal(record["c"], [1.0, math.inf, math.nan])


def test_resuming_removes_what_was_written_of_later_steps(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 10, 20, 30):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # killed in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 10, 20, 30]
    with MetricsWriter(tmp_path, start_step=10) as writer:
        assert [r["step"] for r in lines(tmp_path)] == [1, 10]
        writer.write(20, {"loss": 0.5})
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(1, 1.0), (10, 10.0), (20, 0.5)]
    assert not list(tmp_path.glob("*.partial"))
    with MetricsWriter(tmp_path):
        assert lines(tmp_path) == []


def test_reading_where_nothing_was_written(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_files(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {"loss": 2.5, "gate/1": np.array([0.25, 0.5]), "load": np.ones((2, 20))})
    found = events(tmp_path)
    expected = [(5, "loss", 2.5), (5, "gate/1/0", 0.25), (5, "gate/1/1", 0.5), (5, "load", None)]
    assert [entry for entry in found if entry[1]] == expected


def test_tensorboard_forgets_the_interrupted_launch(tmp_path):
    for start in (0, 10):
        with MetricsWriter(tmp_path, start_step=start) as writer:
            writer.write(start + 10, {"loss": 1.0})
    # SessionLog.START makes TensorBoard drop what earlier files say of this step and later ones.
    data = b"".join(p.read_bytes() for p in sorted((tmp_path / "tensorboard").iterdir()))
    starts = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        if event.session_log.status == event_pb2.SessionLog.START:
            starts.append(event.step)
    assert starts == [1, 11]  # the second launch, of the same second, has left the first's file


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_prints_lines_where_there_is_no_terminal():
    clock, out, rates = Clock(), io.StringIO(), {}
    progress = Progress(100, start=40, rates=lambda: rates, stream=out, clock=clock)
    assert progress.seconds_left() is None
    clock.now += 30  # compilation
    progress.update(41, loss=4.0)
    for step in range(42, 101):
        clock.now += 0.25 + (8 if step == 60 else 0)  # an evaluation before step 60
        rates |= {"step_seconds": 0.25, "tokens_per_second": 2048.0}
        progress.update(step, loss=4 - step / 100)
        if step == 80:
            assert progress.seconds_left() == pytest.approx(20 * (39 * 0.25 + 8) / 39)
            rates |= {"mfu": 0.4567, "goodput": 0.981, "step_seconds/p99": 9.0}
    progress.note("step 100: validation loss 3.1")
    progress.close()
    assert out.getvalue().splitlines() == [  # one line in 10 s, and the last step
        "step 41/100  loss 4.0000",
        "step 60/100  loss 3.4000  2.05k tokens/s  0.25 s/step  0:27 left",
        "step 100/100  loss 3.0000  2.05k tokens/s  0.25 s/step  45.7% mfu  98.1% goodput"
        "  0:00 left",
        "step 100: validation loss 3.1",
    ]


def test_progress_draws_a_bar_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, out = Clock(), Terminal()
    rates = {"step_seconds": 2.0, "tokens_per_second": 1.5e6}
    progress = Progress(4, start=1, rates=lambda: rates, stream=out, clock=clock)
    for step in (2, 3, 4):
        clock.now += 2
        progress.update(step, loss=1.5)
    progress.note("a note")
    progress.close()
    assert "a note\n" in out.getvalue()
    last = re.split(r"[\r\n]", out.getvalue().rstrip())[-1]
    assert last.startswith("100% |")
    assert "4/4" in last
    assert "loss 1.5000  1.5M tokens/s  2 s/step  0:00 left" in last
