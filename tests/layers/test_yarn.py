"""Rotary embedding for longer contexts, against what the paper says of every pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import AttentionConfig, YarnConfig
from engram_jax.layers.rope import frequencies, yarn_softmax_factor
from tests.layers.test_mla import build, forward, inputs, single_document
from tests.oracle.mla import attention

PAPER = YarnConfig(scale=10.0)  # of the paper's 32k stage: 4,096 tokens, alpha 1, beta 32, f 0.707


def turns(dim, theta, length):
    """How often every pair turns within so many tokens."""
    return [length * theta ** (-i / dim) / (2 * np.pi) for i in range(0, dim, 2)]


@pytest.mark.parametrize(
    ("dim", "theta", "yarn"),
    [
        (64, 1e4, PAPER),
        (16, 1e4, YarnConfig(scale=8.0, original_length=256)),
        (64, 5e5, YarnConfig(scale=4.0, original_length=8192, alpha=2.0, beta=64.0)),
        (8, 100.0, YarnConfig(scale=3.0, original_length=20)),  # no pair turns 32 times
    ],
)
def test_fast_pairs_keep_their_frequency_slow_ones_are_divided(dim, theta, yarn):
    found = frequencies(dim, theta, yarn) / frequencies(dim, theta)
    often = turns(dim, theta, yarn.original_length)
    fast = [i for i, count in enumerate(often) if count >= yarn.beta]
    slow = [i for i, count in enumerate(often) if count <= yarn.alpha]
    np.testing.assert_allclose(found[fast], 1, rtol=1e-12)
    np.testing.assert_allclose(found[slow], 1 / yarn.scale, rtol=1e-12)
    ramp = found[max(fast, default=0) : min(slow, default=dim // 2) + 1]
    assert fast == [] or ramp[0] == 1
    np.testing.assert_allclose(np.diff(ramp, 2), 0, atol=1e-12)  # linear in the pair's number
    assert np.all(np.diff(found) <= 1e-12) and 1 / yarn.scale - 1e-12 <= found.min()


def test_the_paper_s_pairs():
    """64 rotated numbers, base 10,000. By hand: 4096 theta^(-2i / 64) / 2 pi is 32 at i = 10.5 and
    1 at i = 22.5, so pairs 0 to 10 stay and those from 23 on are ten times as slow."""
    found = frequencies(64, 1e4, PAPER) / frequencies(64, 1e4)
    np.testing.assert_allclose(found[:11], 1, rtol=1e-12)
    np.testing.assert_allclose(found[23:], 0.1, rtol=1e-12)
    np.testing.assert_allclose(found[10:24], 1 - 0.9 * np.arange(14) / 13, rtol=1e-12)
    # mscale = 0.1 * 0.707 * ln 10 + 1 = 1.162793
    assert yarn_softmax_factor(PAPER) == pytest.approx(1.162793**2, rel=1e-6)


def test_without_an_extension_nothing_changes():
    off = YarnConfig(scale=1.0, original_length=7, alpha=0.1, beta=3.0)
    np.testing.assert_array_equal(frequencies(64, 1e4, off), frequencies(64, 1e4))
    assert yarn_softmax_factor(off) == 1.0


def test_attention_equals_the_oracle_and_step_by_step():
    yarn = YarnConfig(scale=6.0, original_length=40, beta=8.0, mscale=0.5)
    sizes = {"heads": 3, "kv_lora_rank": 6, "nope_dim": 4, "rope_dim": 8, "v_dim": 5}
    config = AttentionConfig(**sizes, rope_theta=100.0, yarn=yarn)
    often = turns(8, 100.0, 40)  # 6.4, 2.0, 0.64, 0.2: two slow ones, and two between
    assert [count <= 1 for count in often] == [False, False, True, True]
    with jax.enable_x64():
        module = build(7, config, "float64", 3)
        x = inputs((1, 30, 7), 3)
        where = single_document(1, 30)
        y = forward(module, x, *where)
        cache, steps = module.init_cache(1, 30), []
        for part in range(0, 30, 10):
            out, cache = module.cached(x[:, part : part + 10], where[0][:, part : part + 10], cache)
            steps.append(out)
        weights = {
            name: np.asarray(getattr(module, name)[...])
            for name in ("q_proj", "kv_a_proj", "kv_b_proj", "o_proj")
        }
    weights["kv_norm"] = np.asarray(module.kv_norm.gain[...])
    # 8 turns would be pair -0.2 and so count from pair 0; one turn is at pair 1.61: to pair 2.
    ramp = np.array([0, 0.5, 1, 1])
    want = attention(
        np.asarray(x[0]),
        np.arange(30),
        np.ones(30),
        weights,
        heads=3,
        nope=4,
        rope=8,
        value=5,
        theta=100.0,
        eps=1e-6,
        slower=1 / (1 - ramp + ramp / 6),
        factor=(1 + 0.05 * np.log(6)) ** 2,
    )
    np.testing.assert_allclose(y[0], want, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), y, rtol=3e-6, atol=3e-6)
