"""Checkpoints: what comes back is what went in."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError
from tests.checkpoint.states import assert_identical, assert_refused, make_state


@pytest.mark.parametrize(("step", "expected"), [(None, 30), (10, 10), ("best", 20)])
def test_restores_bit_for_bit(saved, step, expected):
    with Checkpointer(saved, read_only=True) as checkpointer:
        found = checkpointer.restore(step, make_state(0))
    assert found.step == expected
    assert_identical(found.state, make_state(expected))
    assert found.iterator == {"position": expected}
    assert found.metadata == {"tokens": 7 * expected}
    assert found.metrics["loss"] == {10: 2.0, 20: 1.0, 30: 3.0}[expected]


def test_the_digest_is_of_one_save(saved, tmp_path):
    """A copy has the same. Other numbers, another step and the same saved again have others."""

    def digest(workdir: Path, step: int) -> str:
        with Checkpointer(workdir, read_only=True) as checkpointer:
            return checkpointer.restore(step, make_state(0)).digest

    def saved_again(name: str, step: int, seed: int) -> str:
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(
                step,
                make_state(seed),
                iterator={"position": 10},
                metrics={"loss": 2.0},
                metadata={"tokens": 70},
            )
        return digest(tmp_path / name, step)

    found = {digest(saved, step) for step in (10, 20, 30)}
    copied = shutil.copytree(saved, tmp_path / "copied")
    assert {digest(copied, step) for step in (10, 20, 30)} == found
    found |= {saved_again("same", 10, 10), saved_again("seed", 10, 11), saved_again("step", 11, 10)}
    assert len(found) == 6 and {len(each) for each in found} == {64}


def test_restores_onto_abstract_arrays(saved):
    expected = make_state(30)
    abstract = {k: jax.eval_shape(lambda v=v: v) for k, v in expected.items() if k != "host"}
    with Checkpointer(saved, read_only=True) as checkpointer:
        found = checkpointer.restore(30, {**abstract, "host": expected["host"]}).state
    assert_identical(found, expected)


def test_iterator_bytes_survive(tmp_path):
    state = bytes(range(256))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(1)}, iterator=state)
        assert checkpointer.restore(1, {"x": jnp.ones(1)}).iterator == state


def test_buffers_may_be_donated_and_overwritten_at_once(tmp_path):
    step = jax.jit(lambda table: table + 1, donate_argnums=0)
    table = step(jnp.zeros((200_000, 32)))  # 25 MB: the files take longer than the steps below
    host = np.full((1000, 1000), 5.0)
    abstract = {"table": jax.ShapeDtypeStruct(table.shape, table.dtype), "host": host.copy()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"table": table, "host": host})
        host[:] = -1
        for _ in range(5):
            table = step(table)
        table.block_until_ready()
        found = checkpointer.restore(1, abstract).state
    assert np.all(np.asarray(table) == 6)
    assert np.all(np.asarray(found["table"]) == 1)
    assert np.all(found["host"] == 5)


def test_keeps_the_latest_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 3.0}
    state = {"x": jnp.ones(2)}

    def save(steps):
        with Checkpointer(tmp_path, keep=2, keep_best=1) as checkpointer:
            for step in steps:
                metrics = {} if losses[step] is None else {"loss": losses[step]}
                assert checkpointer.save(step, state, metrics=metrics)
            return checkpointer.steps(), checkpointer.best_step()

    assert save((1, 2, 3, 4)) == ([2, 3, 4], 2)
    assert save((5, 6)) == ([2, 5, 6], 2)  # a second process knows the losses from the files
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]


def test_a_step_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, {"x": jnp.ones(2)})
        assert not checkpointer.save(3, {"x": jnp.zeros(2)})
        assert np.all(checkpointer.restore(3, {"x": jnp.zeros(2)}).state["x"] == 1)


def test_no_checkpoint_at_all(tmp_path, saved):
    with pytest.raises(UserError, match="nothing was saved there"):
        Checkpointer(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.best_step() is None
        with pytest.raises(UserError, match="the latest step was asked for; there is none"):
            checkpointer.restore(None, {})
    message = assert_refused(saved, 11, {}, "step 11 was asked for", "there are steps 10, 20, 30")
    assert "whole" not in message


def test_opening_to_restore_changes_nothing(workdir):
    partial = workdir / "checkpoints" / "40.orbax-checkpoint-tmp"
    partial.mkdir()
    before = sorted(workdir.rglob("*"))
    with Checkpointer(workdir, read_only=True) as checkpointer:
        checkpointer.restore(None, make_state(0))
        with pytest.raises(UserError, match="to restore only"):
            checkpointer.save(50, make_state(50))
    assert sorted(workdir.rglob("*")) == before
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(50, make_state(50))
    assert not partial.exists()


def test_a_relative_workdir_is_as_good(tmp_path, monkeypatch):
    """Orbax itself refuses relative paths, in the background, two saves later."""
    monkeypatch.chdir(tmp_path)
    state = make_state(4)
    with Checkpointer("runs/one") as checkpointer:
        checkpointer.save(4, state)
        checkpointer.save(5, state)
    with Checkpointer(Path("runs/one"), read_only=True) as checkpointer:
        assert checkpointer.steps() == [4, 5]
        assert_identical(checkpointer.restore(5, state).state["memory"], state["memory"])
