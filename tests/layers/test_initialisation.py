"""How parameters start, for all layers of this folder that draw them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, FeedForwardConfig, HyperConnectionConfig
from engram_jax.layers.feed_forward import SwiGLU
from engram_jax.layers.hyper_connections import HyperConnection
from engram_jax.layers.mla import MLA
from engram_jax.layers.moe import MoE

EXPERTS = FeedForwardConfig(routed_experts=8, shared_experts=2, top_k=2, expert_dim=32)
KINDS = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
CREATE = {
    "mla": lambda rngs, std: MLA(
        64, AttentionConfig(), norm_eps=1e-6, init_std=std, rngs=rngs, **KINDS
    ),
    "moe": lambda rngs, std: MoE(64, EXPERTS, init_std=std, rngs=rngs, **KINDS),
    "swiglu": lambda rngs, std: SwiGLU(64, 96, init_std=std, rngs=rngs, **KINDS),
    "hyper": lambda rngs, std: HyperConnection(
        64, HyperConnectionConfig(), 0, init_std=std, param_dtype=jnp.float32, rngs=rngs
    ),
}
NOT_DRAWN = {"kv_norm.gain": 1.0, "norm_gain": 1.0, "scale": 0.01, "base": None}


@pytest.mark.parametrize("name", CREATE)
def test_matrices_are_normal_with_the_given_deviation_and_drawn_apart(name):
    std = 0.03
    params = jax.jit(lambda key: nnx.state(CREATE[name](nnx.Rngs(key), std), nnx.Param))(
        jax.random.key(0)
    )
    drawn = []
    for path, leaf in nnx.to_flat_state(params):
        values, key = np.asarray(leaf.get_value()), ".".join(map(str, path))
        assert values.dtype == np.float32
        if key in NOT_DRAWN:
            if NOT_DRAWN[key] is not None:
                np.testing.assert_array_equal(values, np.float32(NOT_DRAWN[key]))
            continue
        count = values.size
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * count), key
        assert abs(values.mean()) < 5 * std / np.sqrt(count), key
        drawn.append(values.ravel())
    assert drawn
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            size = min(a.size, b.size)
            assert abs(np.corrcoef(a[:size], b[:size])[0, 1]) < 6 / np.sqrt(size)
