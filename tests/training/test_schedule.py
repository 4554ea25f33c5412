import dataclasses
import math

import jax
import numpy as np
import pytest

from engram_jax.config import OptimizerConfig
from engram_jax.training.optim.optimizer import clip_factor
from engram_jax.training.optim.schedule import decay_start, falls, learning_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 4e-4 / 2000),
        (999, 2e-4),
        (1999, 4e-4),
        (2000, 4e-4),
        (39_999, 4e-4),
        (40_000, 4e-4 * 0.316),
        (44_999, 4e-4 * 0.316),
        (45_000, 4e-5),
        (49_999, 4e-5),
    ],
)
def test_the_papers_schedule(step, expected):
    """Warm-up over 2,000 steps, x0.316 at 80 %, x0.1 at 90 % of 50,000 (Appendix A)."""
    rate = learning_rate(OptimizerConfig(), 50_000)
    np.testing.assert_allclose(rate(np.int32(step)), expected, rtol=1e-6)


def closed_form(step: int, total: int, keys: dict) -> float:
    """The schedules as their papers print them, in float64, one step at a time."""
    peak, name = 3e-3, keys["schedule"]
    warm, low = keys.get("warmup_steps", 0), keys.get("min_rate", 0.0)
    value = peak
    if name == "step":
        at = keys.get("decay_at_steps") or [round(f * total) for f in (0.8, 0.9)]
        factors = keys.get("decay_factors", (0.316, 0.1))
        for boundary, factor in zip(at, factors, strict=True):
            value = peak * factor if step >= boundary else value
    elif name != "constant":
        share = keys.get("decay_share", 0.0)
        length = keys.get("decay_steps") or round(share * total) or total - warm
        done = min(1.0, max(0.0, (step - (total - length)) / length))
        shape = {"wsd": keys.get("decay_shape", "linear")}.get(name, name)
        left = {
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "sqrt": 1 - math.sqrt(done),
        }[shape]
        value = peak * (low + (1 - low) * left)
    return value * (step + 1) / warm if step < warm else value


SCHEDULES = [
    {"schedule": "step", "warmup_steps": 7},
    {"schedule": "step", "decay_at_steps": (30, 31, 200), "decay_factors": (0.5, 0.2, 0.0)},
    {"schedule": "constant"},
    {"schedule": "constant", "warmup_steps": 500},
    {"schedule": "cosine"},
    {"schedule": "cosine", "warmup_steps": 10, "min_rate": 0.1},
    {"schedule": "cosine", "warmup_steps": 10, "decay_steps": 50},
    {"schedule": "linear", "warmup_steps": 236},
    {"schedule": "linear", "decay_share": 0.25, "min_rate": 0.5},
    {"schedule": "linear", "decay_share": 1.0, "min_rate": 1.0},
    {"schedule": "wsd", "warmup_steps": 20, "decay_share": 0.2},
    {"schedule": "wsd", "warmup_steps": 20, "decay_steps": 217},
    {"schedule": "wsd", "decay_steps": 1, "min_rate": 0.01},
    {"schedule": "wsd", "decay_share": 0.5, "decay_shape": "cosine", "min_rate": 0.03},
    {"schedule": "wsd", "decay_share": 0.5, "decay_shape": "sqrt", "warmup_steps": 5},
]


@pytest.mark.parametrize("keys", SCHEDULES, ids=str)
def test_every_step_of_every_schedule(keys):
    """And ten steps past the last. float32: the rate has a relative error of some last bits; what
    1 - cos and 1 - sqrt lose in float64 near the end is below the absolute bound."""
    total = 237
    config = OptimizerConfig(peak_lr=3e-3, **{"warmup_steps": 0} | keys)
    steps = np.arange(total + 10, dtype=np.int32)
    found = np.asarray(jax.jit(learning_rate(config, total))(steps))
    expected = [closed_form(int(step), total, keys) for step in steps]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=6e-7, atol=1e-15)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_the_last_step_of_a_long_run_is_not_lost_to_rounding(shape):
    total, length = 2_000_000, 1_000_000
    config = OptimizerConfig(
        schedule="wsd", warmup_steps=0, decay_steps=length, decay_shape=shape, peak_lr=1.0
    )
    last = float(learning_rate(config, total)(np.int32(total - 1)))
    left = 1 / length
    expected = {"linear": left, "cosine": (math.pi / 2 * left) ** 2, "sqrt": left / 2}[shape]
    assert last == pytest.approx(expected, rel=1e-5)


def test_where_the_rate_falls():
    config = OptimizerConfig(warmup_steps=10)
    assert falls(config, 50) == [40, 45]
    by_step = dataclasses.replace(config, decay_at_steps=(3,), decay_factors=(0.5,))
    assert falls(by_step, 50) == [3]
    cosine = dataclasses.replace(config, schedule="cosine")
    assert falls(cosine, 50) == [] and decay_start(cosine, 50) == 10
    assert decay_start(dataclasses.replace(cosine, decay_share=0.3), 50) == 35
    assert decay_start(dataclasses.replace(cosine, decay_steps=4), 50) == 46


def test_clipping_only_shrinks():
    np.testing.assert_allclose(clip_factor(np.float32(16.0), 1.0), 0.25, rtol=1e-6)
    assert float(clip_factor(np.float32(0.25), 1.0)) == 1.0
    assert float(clip_factor(np.float32(0.0), 1.0)) == 1.0
