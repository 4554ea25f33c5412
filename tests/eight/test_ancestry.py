"""A run on 8 devices that starts from one device's checkpoint, and the other way round."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.data.placement import place_batch
from engram_jax.memory.exchange import natural_order
from engram_jax.run.ancestry import Ancestor, start_from
from engram_jax.sharding.rules import make_mesh
from engram_jax.training.state import build_training, create_state
from engram_jax.training.step import eval_step, jit_train_step
from tests.eight.test_training import BATCH, EVERY_AXIS, ONE
from tests.tiny import random_batch, tiny_addressing, tiny_config


def program_on(mesh: tuple, **overrides):
    keys = {"model.layers": 2, "data.batch_size": BATCH, **{f"mesh.{k}": v for k, v in mesh}}
    config = tiny_config(**{**keys, **overrides})
    devices = jax.devices()[: 1 if mesh == ONE else 8]
    return build_training(config, tiny_addressing(config), make_mesh(config.mesh, devices))


def rows_of(program, state):
    return {
        k: np.asarray(natural_order(program.mesh, program.layouts[k], t.rows))[
            : program.table_rows[k]
        ]
        for k, t in state.memory.items()
    }


def started(before: tuple, after: tuple, workdir: Path):
    """(program and state of a checkpoint, those of a run that starts from it on another mesh)."""
    source = program_on(before)
    state = create_state(source)
    with Checkpointer(workdir, addressing=source.addressing) as checkpointer:
        table_order.save(source, checkpointer, 3, state)
    (workdir / "run.json").write_text('{"launches": []}')
    program = program_on(after, **{"train.init_from": str(workdir)})
    ancestor = Ancestor(workdir, 3, source.config, {}, {})
    found, _ = start_from(program, ancestor, lambda line: None)
    return source, state, program, found


@pytest.mark.parametrize(
    "meshes",
    [(ONE, EVERY_AXIS), pytest.param((EVERY_AXIS, ONE), marks=pytest.mark.slow)],
    ids=["1 to 8", "8 to 1"],
)
def test_weights_move_to_any_mesh_bit_for_bit(meshes, tmp_path: Path):
    source, state, program, found = started(*meshes, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    for layer, rows in rows_of(source, state).items():
        np.testing.assert_array_equal(rows_of(program, found)[layer], rows)
    for table in found.memory.values():
        assert not np.any(np.asarray(table.nu))


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [(ONE, EVERY_AXIS), (EVERY_AXIS, ONE)], ids=["1 to 8", "8 to 1"])
def test_the_first_loss_is_an_evaluation_s_on_the_new_mesh(meshes, tmp_path: Path):
    """Bit for bit."""
    _, _, program, found = started(*meshes, tmp_path)
    batch = place_batch(program.mesh, random_batch(program.config), BATCH)
    evaluated = program.jit(partial(eval_step, program))
    nats, targets = evaluated(found.params, found.router_bias, found.memory, batch)
    expected = np.asarray(nats / targets)
    _, metrics = jit_train_step(program)(found, batch)
    np.testing.assert_array_equal(metrics["loss"], expected)
