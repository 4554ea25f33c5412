"""Files of the run's folder."""

from __future__ import annotations

import pytest

from engram_jax.checkpoint.workdir import file_of_step


@pytest.mark.parametrize(
    ("steps", "step", "name"),
    [
        ((), 7, "scores.json"),
        ((4, 12), 12, "scores.json"),
        ((4, 12), 13, "scores.json"),  # the end of training, before its checkpoint is there
        ((4, 12), 4, "scores_4.json"),
    ],
)
def test_another_step_overwrites_nothing_of_the_newest(tmp_path, steps, step, name):
    for saved in steps:
        (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
    assert file_of_step(tmp_path, "scores.json", step) == tmp_path / name
