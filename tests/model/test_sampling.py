import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.model.sampling import key_of_token, log_probabilities, sample, sample_rows

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.1, 0.8]]))


def frequencies(row, draws=20_000, **options):
    logits = jnp.tile(LOGITS[row], (draws, 1))
    tokens = jax.jit(lambda k: sample(logits, k, **options))(jax.random.key(0))
    return np.bincount(np.asarray(tokens), minlength=4) / draws


def test_greedy_takes_the_largest():
    assert sample(LOGITS, jax.random.key(0), temperature=0).tolist() == [0, 3]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1.2e-38, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("shift", [400, 0])
def test_low_temperatures_are_as_good_as_greedy(temperature, top_p, shift):
    """All logits above zero, or all below: divided, all might be the same infinity."""
    logits = 100 * LOGITS[::-1] + shift
    compiled = jax.jit(sample, static_argnames=("temperature", "top_p"))
    for function in (sample, compiled):
        found = function(logits, jax.random.key(0), temperature=temperature, top_p=top_p)
        assert found.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, np.array([16, 9, 4, 1]) / 30),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_draws_follow_the_truncated_distribution(options, expected):
    """20,000 draws: four standard deviations are 0.014."""
    np.testing.assert_allclose(frequencies(0, **options), expected, atol=0.014)


def test_rows_are_independent_and_seeds_repeat():
    one = sample(LOGITS, jax.random.key(3), temperature=1.0)
    two = sample(LOGITS, jax.random.key(3), temperature=1.0)
    assert one.tolist() == two.tolist() and one.shape == (2,) and one.dtype == jnp.int32


def test_rows_with_settings_of_their_own_draw_as_they_would_alone():
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 3, (64, 40)).astype(np.float32)
    seed = rng.integers(0, 2**32, 64).astype(np.uint32)
    step = rng.integers(0, 1000, 64).astype(np.int32)
    temperature = rng.choice([0.0, 1e-42, 0.3, 1.0, 2.0], 64).astype(np.float32)
    top_p = rng.choice([0.1, 0.7, 0.95, 1.0], 64).astype(np.float32)
    top_k = rng.choice([0, 1, 3, 17, 40], 64).astype(np.int32)
    found = np.asarray(jax.jit(sample_rows)(logits, seed, step, temperature, top_p, top_k))
    for row in range(64):
        key = key_of_token(seed[row], step[row])
        how = {"temperature": float(temperature[row]), "top_p": float(top_p[row])}
        alone = sample(logits[row : row + 1], key, **how, top_k=int(top_k[row]))
        assert int(alone[0]) == found[row], row
    assert len(set(found.tolist())) > 15


def test_log_probabilities_against_float64():
    logits = np.random.default_rng(0).normal(0, 5, (3, 2, 50)).astype(np.float32)
    chosen = np.array([[0, 49], [7, 7], [3, 1]], np.int32)
    own, top, ids = log_probabilities(logits, chosen, 4)
    wide = logits.astype(np.float64)
    wanted = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(own, np.take_along_axis(wanted, chosen[..., None], -1)[..., 0], 1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-wanted, axis=-1)[..., :4])
    np.testing.assert_allclose(top, -np.sort(-wanted, axis=-1)[..., :4], 1e-5)
