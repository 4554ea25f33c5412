"""No two uses of a seed draw the same numbers, nor do neighbouring seeds."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from engram_jax.config import random_streams
from engram_jax.model.sampling import key_of_token
from engram_jax.model.transformer import stages
from engram_jax.serve.http.completion_request import _seed
from engram_jax.training.state import build_training, init_state
from tests.tiny import tiny_addressing, tiny_config

SEEDS = (0, 1, 2, 2**32 - 1)
TOKENS = 40


@pytest.fixture(scope="module")
def drawn():
    """Of every seed: (all keys that were derived from it, {name: array of the initial state}).

    Keys are read where JAX derives them, so that one which two places derive is counted twice; a
    key split into n counts as the n that come out.
    """
    config = tiny_config(**{"model.engram.layers": (1, 2)})
    program = build_training(config, tiny_addressing(config))
    keys = []

    def watched(derive):
        def derived(key, *how):
            found = derive(key, *how)
            words = jax.random.key_data(found)
            jax.debug.callback(lambda w: keys.extend(map(tuple, w.reshape(-1, 2).tolist())), words)
            return found

        return derived

    def start(seed):
        train = dataclasses.replace(config.train, seed=seed)
        own = dataclasses.replace(program, config=dataclasses.replace(config, train=train))
        state = init_state(own)
        jax.vmap(key_of_token, (None, 0))(seed, np.arange(TOKENS, dtype=np.int32))
        return state.params, {k: table.rows for k, table in state.memory.items()}

    found = {}
    with pytest.MonkeyPatch.context() as patched:
        for name in ("fold_in", "split"):
            patched.setattr(jax.random, name, watched(getattr(jax.random, name)))
        start = jax.jit(start).lower(np.uint32(0))
        start = start.compile(compiler_options={"xla_backend_optimization_level": 0})  # sooner
        for seed in SEEDS:
            state = start(np.uint32(seed))
            jax.effects_barrier()
            leaves = jax.tree_util.tree_leaves_with_path(state)
            arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
            found[seed], keys = (keys[:], arrays), keys[:0]
    return found


def test_no_key_is_derived_twice(drawn):
    counted = Counter(key for keys, _ in drawn.values() for key in keys)
    per_seed = len(counted) / len(SEEDS)
    assert per_seed > TOKENS + 30  # the parameters' and the tables' were seen, too
    assert [key for key, n in counted.items() if n > 1] == []


def pieces(arrays, other):
    """Every drawn array in one row each, normalised: stacked ones by layer, experts and projections
    by matrix. What is equal for two seeds was not drawn."""
    for name, x in arrays.items():
        if not np.array_equal(x, other[name]):
            for piece in (
                x.reshape(-1, *x.shape[-2:]) if "projection" not in name else x.swapaxes(0, 1)
            ):
                flat = piece.astype(np.float64).ravel()
                yield name, flat / np.sqrt(np.mean(flat**2))


def most_alike(values, shortest=64):
    """The largest correlation of two rows at any lag, in standard deviations, and which two.

    Without relation it is a sum of n products of normal numbers over sqrt(n); where n >= shortest
    values of one are those of the other, sqrt(n).
    """
    size = 2 * max(map(len, values))
    spectra = [np.fft.rfft(x, size) for x in values]
    lag = np.arange(size)
    lag = np.where(lag < size // 2, lag, lag - size)
    best = (0.0, 0, 0)
    for i, a in enumerate(values):
        for j, b in enumerate(values[:i]):
            overlap = np.minimum(len(a), len(b) + lag) - np.maximum(0, lag)
            sums = np.fft.irfft(spectra[i] * spectra[j].conj(), size)
            scaled = np.abs(sums) / np.sqrt(np.maximum(overlap, 1))
            best = max(best, (scaled[overlap >= shortest].max(initial=0), i, j))
    return best


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_no_two_arrays_of_a_model_are_correlated(drawn, seed):
    """At no lag, so prefixes and shifted draws count as well."""
    _, arrays = drawn[seed]
    names, values = zip(*pieces(arrays, drawn[SEEDS[3]][1]), strict=True)
    for wanted in (
        "[1]['1']",
        "[1]['2']",
        "['embedding']",
        "['router']",
        "['projection']",
        "['fn']",
    ):
        assert any(wanted in name for name in names), wanted
    found, i, j = most_alike(values)
    assert found < 7, (names[i], names[j])


def test_the_measure_sees_equal_draws(drawn):
    _, values = zip(*pieces(drawn[0][1], drawn[1][1]), strict=True)
    lengths = np.array([len(x) for x in values])
    longest = int(lengths.argmax())
    moved = values[0].copy()
    moved[30:130] = values[longest][5:105]
    found, i, _ = most_alike([*values[1:], moved])
    assert found > 7 and i == len(values) - 1


def test_the_same_array_of_two_seeds_is_not_correlated(drawn):
    for one, other in zip(SEEDS, (*SEEDS[1:], SEEDS[0]), strict=True):
        a, b = (list(pieces(drawn[s][1], drawn[t][1])) for s, t in ((one, other), (other, one)))
        for (name, x), (_, y) in zip(a, b, strict=True):
            assert abs(x @ y) / np.sqrt(len(x)) < 6, name


def test_numbers_for_other_generators_differ():
    """Rounding of every table, choices of every request: neighbouring seeds share none."""
    numbers = [
        random_streams.number(seed, name, index)
        for seed in range(50)
        for name in (random_streams.ROUNDING, random_streams.SAMPLING)
        for index in range(8)
    ]
    choices = [_seed(seed, choice) for seed in range(50) for choice in range(8)]
    assert len(set(numbers)) == len(numbers) and len(set(choices)) == len(choices)
    assert all(0 <= n < 2**32 for n in [*numbers, *choices])
    assert [_seed(seed, 0) for seed in (5, -1, 2**40 + 3)] == [5, 2**32 - 1, 3]


def _weights(**changes):
    """Initial parameters by path; those of a layer under its own id, whichever stack it is in."""
    config = tiny_config(**{"model.layers": 4, "model.hyper.streams": 2, **changes})
    state = init_state(build_training(config, tiny_addressing(config)))
    found = {}
    for stage in stages(config.model):
        for i in range(stage.count):
            layers = state.params["blocks"][stage.name]["blocks"]
            layer = jax.tree.map(lambda x, i=i: x[i], layers)
            found["block", stage.first + i] = layer
    found |= {("engram", k): x for k, x in state.params.get("engrams", {}).items()}
    return found | {("embedding",): state.params["embedding"]}


def test_a_module_starts_the_same_whatever_else_the_model_has():
    without = _weights(**{"model.engram.layers": ()})
    one = _weights(**{"model.engram.layers": (1,)})
    two = _weights(**{"model.engram.layers": (1, 3), "model.ffn.routed_experts": 3})
    for name, values in without.items():
        jax.tree.map(np.testing.assert_array_equal, one[name], values)
    jax.tree.map(np.testing.assert_array_equal, one["engram", "1"], two["engram", "1"])
    for layer in range(4):
        same = without["block", layer]["attention"], two["block", layer]["attention"]
        jax.tree.map(np.testing.assert_array_equal, *same)
    # The experts of fewer are the first of more.
    for layer in range(1, 4):
        for name in ("gate", "up", "down"):
            few, many = two["block", layer]["ffn"][name], one["block", layer]["ffn"][name]
            assert len(few) == 3 < len(many)
            np.testing.assert_array_equal(few, many[:3])
    # Layers start differently.
    q_proj = [np.asarray(without["block", layer]["attention"]["q_proj"]) for layer in range(4)]
    assert len({x.tobytes() for x in q_proj}) == 4
