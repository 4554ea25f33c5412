"""Modules with random parameters: no initialisers to compile, no zeros that hide a term."""

import jax
import numpy as np
from flax import nnx


def filled(create, seed=0, std=0.5):
    """The module `create()` returns, every nnx.Param of it normal(0, std) in its own dtype."""
    graphdef, state = nnx.split(nnx.eval_shape(create))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        return jax.numpy.asarray(rng.normal(0.0, std, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, state))
