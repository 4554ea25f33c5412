"""A workdir with checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engram_jax.checkpoint.manager import Checkpointer
from tests.checkpoint.states import make_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with steps 10, 20 and 30; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpointer(workdir) as checkpointer:
        for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
            checkpointer.save(
                step,
                make_state(step),
                iterator={"position": step},
                metrics={"loss": loss},
                metadata={"tokens": 7 * step},
            )
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")
