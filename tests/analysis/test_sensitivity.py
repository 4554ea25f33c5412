"""Parts that are off, against switches of the model, tables that are zeroed, and counts by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import lru_cache

import jax
import numpy as np
import pytest

from engram_jax.addressing.hash_numpy import canonicalise
from engram_jax.analysis.sensitivity import (
    Effect,
    Part,
    counts_at,
    losses_by_frequency,
    parts_of,
    sensitivity,
)
from engram_jax.analysis.usage import BANDS, count_ngrams
from engram_jax.training.step import score_step
from tests.tiny import random_batch, tiny


@pytest.fixture(scope="module")
def given():
    """(program, state, batches, texts, their n-grams, effects by name). The texts, those of
    training, are one of the batches and half of the other."""
    program, state = tiny()
    batches = [random_batch(program.config, seed) for seed in range(2)]
    for batch in batches:
        batch["tokens"][:] %= 7  # n-grams repeat
    texts = [(b["tokens"], b["segments"]) for b in (batches[0], batches[1])]
    texts[1] = (texts[1][0][:2], texts[1][1][:2])
    ngrams = count_ngrams(program.addressing, program.addressing.layers[1], texts)
    effects = sensitivity(program, variables(state), batches, parts_of(program), ngrams)
    return program, state, batches, texts, ngrams, {e.part.name: e for e in effects}


def variables(state):
    return state.params, state.router_bias, state.memory


@lru_cache
def compiled(**off):
    program, _ = tiny()
    serve = dataclasses.replace(program.config.serve, **off)
    return jax.jit(lambda *given: score_step(program, *given, serve)[0])


def nats_of(state, batches, rows=None, **off):
    memory = state.memory
    if rows is not None:
        memory = {"1": dataclasses.replace(memory["1"], rows=rows)}
    step = compiled(**off)
    found = [step(state.params, state.router_bias, memory, batch) for batch in batches]
    return np.asarray(found, np.float64)


def test_layers_and_orders_are_the_switches(given):
    _, state, batches, *_, effects = given
    base = nats_of(state, batches)
    for name, off in (
        ("all layers", {"off_layers": (-1,)}),
        ("layer 1", {"off_layers": (1,)}),
        ("2-grams", {"off_orders": (2,)}),
        ("3-grams", {"off_orders": (3,)}),
    ):
        effect, changed = effects[name], nats_of(state, batches, **off)
        np.testing.assert_allclose(effect.nats, changed.sum(), rtol=1e-5)
        np.testing.assert_allclose(effect.base, base.sum(), rtol=1e-5)
        assert effect.targets == effect.affected == sum(b["loss_mask"].sum() for b in batches)
        rise = (changed.sum() - base.sum()) / effect.targets
        np.testing.assert_allclose([effect.rise, effect.rise_where_affected], rise, atol=1e-5)
        assert abs(rise) > 1e-3


def test_a_head_is_its_rows_of_the_table(given):
    program, state, batches, *_, effects = given
    layer = program.addressing.layers[1]
    for head, (offset, size) in enumerate(zip(layer.offsets, layer.head_sizes, strict=True)):
        rows = np.array(state.memory["1"].rows)
        rows[offset : offset + size] = 0
        order = layer.orders[head // layer.heads_per_order]
        effect = effects[f"layer 1, head {head % layer.heads_per_order} of the {order}-grams"]
        changed = nats_of(state, batches, rows)
        np.testing.assert_allclose(effect.nats, changed.sum(), rtol=1e-5)
    assert len(effects) == 2 + 2 * (1 + len(BANDS)) + layer.heads


def test_bands_are_counts_in_training(given):
    program, _, batches, texts, ngrams, effects = given
    layer = program.addressing.layers[1]

    def ngrams_of(tokens, segments):
        canonical = canonicalise(tokens, program.addressing.compression)
        for b, t in np.argwhere(segments > 0):
            inside = [t - k >= 0 and segments[b, t - k] == segments[b, t] for k in range(3)]
            ids = [int(canonical[b, t - k]) if inside[k] else layer.fill_id for k in range(3)]
            yield (b, t), {n: tuple(ids[:n]) for n in (2, 3)}

    known = Counter((n, g) for text in texts for _, by in ngrams_of(*text) for n, g in by.items())
    wanted = Counter()
    for batch in batches:
        found = counts_at(program, batch, ngrams)
        for (b, t), by in ngrams_of(batch["tokens"], batch["segments"]):
            for n, ngram in by.items():
                assert found[n][b, t] == known[n, ngram]
                if batch["loss_mask"][b, t] > 0:
                    band = max(low for low in BANDS if low <= known[n, ngram])
                    wanted[n, band] += 1
    for n in (2, 3):
        counted = {
            effect.part.band[1]: effect.affected
            for effect in effects.values()
            if effect.part.band and effect.part.band[0] == n
        }
        assert counted == {low: wanted[n, low] for low in BANDS}
        assert sum(counted.values()) == effects["all layers"].targets
    names = [
        f"{n}-grams {w} in training" for n in (2, 3) for w in ("never", "once", "2 to 3 times")
    ]
    assert set(names) <= set(effects)
    some = effects["3-grams never in training"]
    assert some.affected and some.rise != 0
    share = some.affected / some.targets
    assert abs(some.rise_where_affected) > abs(some.rise) * 0.5 / share


def test_the_standard_error_is_that_of_sequences(given):
    _, state, batches, *_, effects = given
    base, off = (nats_of(state, batches, off_layers=x) for x in ((), (1,)))
    rises = (off - base).sum(axis=2).reshape(-1)
    counts = np.concatenate([b["loss_mask"].sum(axis=1) for b in batches])
    n, total = len(counts), counts.sum()
    residual = rises - rises.sum() / total * counts
    wanted = np.sqrt(n / (n - 1) * (residual**2).sum()) / total
    assert effects["layer 1"].sequences == n
    np.testing.assert_allclose(effects["layer 1"].error, wanted, rtol=1e-3)
    assert np.isnan(Effect(Part("x", ())).error)


def test_losses_by_frequency_are_those_of_the_targets(given):
    program, state, batches, _, ngrams, _ = given
    on, off = (nats_of(state, batches, off_layers=x) for x in ((), (-1,)))
    counts = [counts_at(program, batch, ngrams) for batch in batches]
    mask = np.stack([batch["loss_mask"] > 0 for batch in batches])
    found = losses_by_frequency(program, variables(state), batches, ngrams)
    assert [(band.order, band.low) for band in found] == [(n, b) for n in (2, 3) for b in BANDS]
    for band in found:
        count = np.stack([c[band.order] for c in counts])
        hit = mask & (count >= band.low) & (count < band.high)
        assert band.targets == hit.sum()
        np.testing.assert_allclose(band.nats, on[hit].sum(), rtol=1e-5)
        np.testing.assert_allclose(band.off_nats, off[hit].sum(), rtol=1e-5)
    assert sum(band.targets for band in found) == 2 * mask.sum()
    assert sum(band.targets > 0 for band in found) >= 4
