"""The whole model on kernels (interpreted) against the whole model on plain jax.numpy."""

from functools import partial

import jax
import numpy as np
import pytest

from engram_jax.training.step import batch_addresses, fetch_rows, gradients
from tests.tiny import random_batch, tiny

WIDE = {  # what the kernels take, and little of it
    "model.d_model": 128,
    "model.layers": 2,
    "model.engram.d_mem": 128,
    "model.init_std": 0.05,
    "data.seq_len": 20,
    "data.batch_size": 2,
}


def loss_and_gradients(program, state, batch):
    @jax.jit
    def run(state, batch):
        rows, _ = fetch_rows(program, state.memory, batch_addresses(program, batch))
        loss, of_params, of_rows, _ = gradients(program, state, rows, batch)
        return loss, {"params": of_params, "rows": of_rows}

    return run(state, batch)


@pytest.mark.parametrize("precision", ["model", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_training_step_is_the_same(precision):
    """Documents packed, some tokens without memory; FP8 rounds alike in both."""
    keys = {**WIDE, "model.engram.precision": precision}
    (program, state), (kernels, _) = (
        tiny(**keys, **{"model.kernels": name}) for name in ("reference", "pallas")
    )
    batch = random_batch(program.config)
    batch["tokens"][:, ::7] = -1
    (loss, plain), (other, ours) = (loss_and_gradients(p, state, batch) for p in (program, kernels))
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    named = partial(jax.tree_util.tree_leaves_with_path)
    for (path, a), (_, b) in zip(named(ours), named(plain), strict=True):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
        assert error <= 1e-3, (jax.tree_util.keystr(path), error)


def test_the_kernels_are_in_the_program():
    """All four, forward and backward."""
    program, state = tiny(**WIDE, **{"model.kernels": "pallas"})
    batch = random_batch(program.config)
    rows, _ = fetch_rows(program, state.memory, batch_addresses(program, batch))
    text = str(jax.make_jaxpr(partial(gradients, program))(state, rows, batch))
    for name in ("engram_gate", "short_conv", "mhc_pre", "mhc_merge"):
        assert f"name={name}\n" in text or f"name={name} " in text, name
        assert f"name={name}_backward" in text, name
