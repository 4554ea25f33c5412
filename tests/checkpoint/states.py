"""States to save, and what must come back of them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError


def make_state(seed: int) -> dict:
    """A small state with every kind of leaf a run has."""
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "blocks": [
                {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)},
                {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16)},
            ]
        },
        "memory": {"1": (jnp.asarray(rng.normal(size=(60, 4)), jnp.float32),)},
        "router": jnp.zeros((0, 8), jnp.float32),
        "host": rng.integers(0, 1 << 40, size=7),
        "step": jnp.int32(seed),
    }


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_refused(workdir: Path, step, abstract, *words: str, addressing=None) -> str:
    """Restoring raises one line that names the checkpoint and the reason."""
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        with pytest.raises(UserError) as caught:
            checkpointer.restore(step, abstract)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(workdir / "checkpoints"), *words):
        assert word in message
    return message
