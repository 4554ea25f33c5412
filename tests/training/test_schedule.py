import numpy as np
import pytest

from engram_jax.config import OptimizerConfig
from engram_jax.training.optim.optimizer import clip_factor
from engram_jax.training.optim.schedule import learning_rate


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


def test_clipping_only_shrinks():
    np.testing.assert_allclose(clip_factor(np.float32(16.0), 1.0), 0.25, rtol=1e-6)
    assert float(clip_factor(np.float32(0.25), 1.0)) == 1.0
    assert float(clip_factor(np.float32(0.0), 1.0)) == 1.0
