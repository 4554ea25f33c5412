"""benchmarks.offload: its interval, and the commands that the documentation prints for it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks import offload

ROOT = Path(__file__).resolve().parents[2]


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    """Slices of very different length, errors that grow with them."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        work = rng.choice([0.05, 0.5], 80, p=[0.7, 0.3])
        mine, baseline = (scale * work * rng.normal(1, 0.1, 80) for scale in (1.03, 1.0))
        ratio, half = offload._interval(mine.tolist(), baseline.tolist())
        held += abs(ratio - 1.03) < half
    assert 925 < held < 970


def test_the_interval_of_equal_ratios_is_a_point():
    ratio, half = offload._interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio == 2 and half == pytest.approx(0, abs=1e-12)
    assert offload._interval([3.0], [2.0]) == (1.5, float("inf"))


def test_the_documented_commands_are_understood():
    commands = []
    for path in (ROOT / "docs" / "serving.md", ROOT / "benchmarks" / "offload.py"):
        text = path.read_text().replace("\\\n", " ")
        commands += re.findall(r"python -m benchmarks\.offload\b([^`\n#]*)", text)
    assert len(commands) >= 4
    for command in commands:
        words = [w for w in shlex.split(command) if not w.startswith("--json")]
        chosen, rest = offload.options(words)
        assert rest == []
        assert set(chosen.variants.split(",")) <= set(offload.VARIANTS)
