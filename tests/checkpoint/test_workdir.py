"""Files of the run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram_jax.checkpoint.workdir import file_of_step, locked
from engram_jax.config.errors import UserError


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


def test_a_launch_that_fails_before_its_record_leaves_no_folder(tmp_path):
    """A folder that was there stays as it is, and so does a run."""

    def fail(workdir: Path, *, record: bool = False) -> None:
        with locked(workdir):
            (workdir / "checkpoints").mkdir()
            if record:
                (workdir / "run.json").write_text("{}")
            raise UserError("the other run's checkpoint is damaged")

    with pytest.raises(UserError, match="damaged"):
        fail(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").touch()
    for name, record in (("there", False), ("run", True)):
        with pytest.raises(UserError, match="damaged"):
            fail(tmp_path / name, record=record)
    assert (tmp_path / "there" / "mine.txt").is_file()
    assert (tmp_path / "run" / "run.json").is_file()
