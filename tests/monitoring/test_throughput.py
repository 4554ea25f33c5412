"""Step times, utilisation and goodput, by a clock the test turns; expected values by hand."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.hardware.peak_flops import peak_flops
from engram_jax.model import describe
from engram_jax.monitoring.goodput import Goodput, read
from engram_jax.monitoring.throughput import Throughput
from tests.runs import configuration


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_medians_and_percentiles_without_the_pauses():
    clock, rng = Clock(), np.random.default_rng(0)
    throughput = Throughput(
        tokens_per_step=6000, devices=4, flops_per_step=8e12, peak_flops=1e13, clock=clock
    )
    clock.now += 300  # compilation
    throughput.finished()
    assert throughput.rates() == {} and throughput.training_seconds == 0
    times = rng.uniform(1, 2, size=300)
    times[290] = 40
    for n, seconds in enumerate(times):
        clock.now += seconds
        throughput.finished()
        if n % 7 == 0:
            with throughput.pause():
                clock.now += 1000  # an evaluation
    rates, recent, median = throughput.rates(), times[-200:], np.median(times[-50:])
    assert rates == pytest.approx(
        {
            "step_seconds": median,
            "tokens_per_second": 6000 / median,
            "tokens_per_second_per_device": 1500 / median,
            "mfu": 8e12 / median / 4e13,
            "step_seconds/p50": np.sort(recent)[99:101].mean(),
            "step_seconds/p90": np.quantile(recent, 0.9),
            "step_seconds/p99": np.quantile(recent, 0.99),
            "step_seconds/max": 40,
        }
    )
    # The first step counts as the median of those the clock has seen.
    assert throughput.training_seconds == pytest.approx(times.sum() + np.median(recent))


def test_no_utilisation_where_the_peak_is_unknown():
    clock = Clock()
    throughput = Throughput(tokens_per_step=1, peak_flops=peak_flops("cpu"), clock=clock)
    for _ in range(2):
        clock.now += 1
        throughput.finished()
    assert "mfu" not in throughput.rates()


def test_peaks_go_by_the_names_that_jax_gives():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200")
    assert peak_flops("TPU v5 litepod") is None


@pytest.mark.parametrize("name", ["engram_tiny", "engram27b", "dense4b"])
def test_the_flops_are_those_that_describe_prints(name):
    config = configuration(name)
    assert describe.training_flops(config) == describe.describe(config)["flops_per_token"]


class Launch:
    """A launch whose seconds the test decides; killed unless `close` is called."""

    def __init__(self, workdir, clock: Clock, resumed_at: int, start_up: float):
        self.clock, self.training = clock, 0.0
        started = clock.now
        clock.now += start_up
        self.goodput = Goodput(
            workdir,
            resumed_at=resumed_at,
            training_seconds=lambda: self.training,
            started=started,
            clock=clock,
            every=3600,
        )
        self.goodput.write()

    def train(self, seconds: float) -> None:
        self.clock.now += seconds
        self.training += seconds

    def save(self, step: int) -> None:
        self.clock.now += 1
        self.goodput.saved(step)


def test_goodput_counts_what_the_run_stands_on_over_all_launches(tmp_path):
    clock = Clock()
    first = Launch(tmp_path, clock, 0, start_up=30)
    first.train(40)
    assert first.goodput.value() == pytest.approx(40 / 70)
    first.save(10)
    first.train(20)
    first.save(15)
    first.train(7)
    first.goodput.write()  # the last sign of life, 99 s after the start: killed

    clock.now += 5000  # nobody's time
    second = Launch(tmp_path, clock, 15, start_up=10)
    assert second.goodput.value() == pytest.approx(60 / (99 + 10))
    second.train(50)
    second.save(30)
    assert second.goodput.value() == pytest.approx(110 / (99 + 61))

    # Checkpoints 15 and 30 are lost, so the third goes back to 10.
    third = Launch(tmp_path, clock, 10, start_up=0)
    third.train(10)
    assert third.goodput.value() == pytest.approx((40 + 10) / (99 + 61 + 10))
    launches = json.loads((tmp_path / "goodput.json").read_text())["launches"]
    assert [launch["resumed_at"] for launch in launches] == [0, 15, 10]


def test_a_killed_launch_is_heard_by_its_thread(tmp_path):
    """Nothing but time passes: what the file says comes from the thread."""
    goodput = Goodput(tmp_path, resumed_at=0, training_seconds=lambda: 0.0, every=0.02)
    with goodput:
        deadline = time.monotonic() + 30
        while read(tmp_path)[0]["seconds"] < 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(tmp_path)[0]["seconds"] >= 0.1


@pytest.mark.parametrize("text", ["{", "[]", '{"launches": [3]}', '{"launches": [{"seconds": 1}]}'])
def test_a_foreign_account_is_refused_and_kept(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    with pytest.raises(UserError, match=r"goodput\.json: .*not an account of launches"):
        Goodput(tmp_path, resumed_at=0, training_seconds=lambda: 0.0)
    assert (tmp_path / "goodput.json").read_text() == text
