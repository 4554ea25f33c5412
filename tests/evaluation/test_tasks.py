"""Scores of synthetic tasks: against the NumPy model, greedy decoding and sums done by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial

import jax
import numpy as np
import pytest

from engram_jax.config import GenerateConfig, ProductKeyConfig
from engram_jax.data.mixed_tasks import TaskItems
from engram_jax.evaluation.tasks import (
    ItemScore,
    encode,
    jit_scores,
    score,
    score_tasks,
    summarise,
)
from engram_jax.model.decode import Generator
from engram_jax.tasks.drawing import Item
from engram_jax.tasks.score_table import as_row, table
from engram_jax.training.state import build_training, init_state, weights_of
from tests.oracle import transformer as oracle
from tests.tiny import VOCAB, tiny, tiny_addressing, tiny_config

# Candidates of different lengths, more of them than a batch has rows.
PROMPTS, ANSWERS = (7, 3, 5), ((2, 1, 3), (1, 1, 2), (3, 3))


@pytest.fixture(scope="module")
def model():
    program, state = tiny()
    return program, state, weights_of(program, state)


@pytest.fixture(scope="module")
def encoded():
    rng = np.random.default_rng(3)
    out = []
    for length, answers in zip(PROMPTS, ANSWERS, strict=True):
        prompt = rng.integers(3, VOCAB, length).tolist()
        out.append([(prompt + rng.integers(3, VOCAB, n).tolist(), length) for n in answers])
    return out


def log_probabilities(program, state, ids):
    to64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    tables = {k: np.asarray(t.rows, np.float64) for k, t in state.memory.items()}
    params, bias = to64(state.params), to64(state.router_bias)
    logits = oracle.forward(params, bias, tables, np.array(ids), program.config, program.addressing)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def without_memory(program):
    engram = dataclasses.replace(program.config.model.engram, layers=())
    network = dataclasses.replace(program.config.model, engram=engram)
    return dataclasses.replace(program, config=dataclasses.replace(program.config, model=network))


def test_rows_that_are_masked_are_rows_of_zeros(model, encoded):
    """Those of a head, against its rows of the table."""
    program, _, weights = model
    layer = program.addressing.layers[1]
    head = np.zeros(layer.heads, bool)
    head[2] = True
    compiled = jit_scores(program)

    def masks(batch):
        return {"1": np.broadcast_to(head, (*batch["tokens"].shape, layer.heads))}

    found = score(program, weights, encoded, compiled=compiled, masks=masks)
    rows = np.array(weights.rows["1"])
    rows[layer.offsets[2] : layer.offsets[2] + layer.head_sizes[2]] = 0
    zeroed = dataclasses.replace(weights, rows={"1": rows})
    wanted = score(program, zeroed, encoded)
    on = score(program, weights, encoded)
    for mine, theirs, before in zip(found, wanted, on, strict=True):
        np.testing.assert_allclose(mine.log_likelihoods, theirs.log_likelihoods, atol=1e-5)
        assert np.abs(mine.log_likelihoods - before.log_likelihoods).max() > 1e-3


def test_candidates_are_scored_at_their_own_lengths(model):
    """Of one item, on both sides of what a short one is padded to; in the item's order."""
    program, state, weights = model
    ids = np.random.default_rng(4).integers(3, VOCAB, 34).tolist()
    item = [(ids[:33], 31), (ids[:32], 31), (ids, 31), (ids[:31], 30)]
    (found,) = score(program, weights, [item])
    logs = log_probabilities(program, state, ids)
    each = [logs[i - 1, ids[i]] for i in range(30, 34)]
    expected = [sum(each[1:3]), each[1], sum(each[1:]), each[0]]
    np.testing.assert_allclose(found.log_likelihoods, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("off", [(), ("1",)])
def test_likelihoods_equal_numpy_float64(model, encoded, off):
    program, state, weights = model
    found = score(program, weights, encoded, off)
    numpy_program = without_memory(program) if off else program
    for item, scored in zip(encoded, found, strict=True):
        expected = []
        for ids, shared in item:
            logs = log_probabilities(numpy_program, state, ids)
            expected.append(sum(logs[i - 1, ids[i]] for i in range(shared, len(ids))))
        np.testing.assert_allclose(scored.log_likelihoods, expected, rtol=1e-3, atol=1e-3)
        assert scored.correct == (np.argmax(expected) == 0)


def test_product_keys_are_switched_off_too(encoded):
    sizes = {"sub_keys": 8, "key_dim": 4, "heads": 2, "top_k": 3, "dim": 6, "layers": (2,)}
    overrides = {f"model.product_keys.{key}": value for key, value in sizes.items()}
    program, state = tiny(**overrides)
    found = score(program, weights_of(program, state), encoded[:1], ("1", "2"))
    network = dataclasses.replace(program.config.model, product_keys=ProductKeyConfig())
    numpy_program = without_memory(
        dataclasses.replace(program, config=dataclasses.replace(program.config, model=network))
    )
    for (ids, shared), value in zip(encoded[0], found[0].log_likelihoods, strict=True):
        logs = log_probabilities(numpy_program, state, ids)
        expected = sum(logs[i - 1, ids[i]] for i in range(shared, len(ids)))
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_over_encoding_switched_off_keeps_the_share_of_the_embedding(encoded):
    """The NumPy model without memory whose input is divided by three, 1 + two orders: that of an
    embedding divided by three, whose logits, from the same matrix, are then too small by three."""
    over = {"model.engram.form": "over_encoding", "model.engram.layers": (0,)}
    config = tiny_config(**over, **{"model.engram.case": True})
    classes = np.arange(VOCAB, dtype=np.int32) % 10
    addressing = dataclasses.replace(tiny_addressing(config), case=classes)
    program = build_training(config, addressing)
    state = jax.jit(lambda: init_state(program))()
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), state.params)
    state = dataclasses.replace(state, params=params)
    found = score(program, weights_of(program, state), encoded[:1], ("0",))
    params, bias = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (state.params, state.router_bias)
    )
    params["embedding"] = params["embedding"] / 3
    config = without_memory(program).config
    for (ids, shared), value in zip(encoded[0], found[0].log_likelihoods, strict=True):
        logits = 3 * oracle.forward(params, bias, {}, np.array(ids), config, program.addressing)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(logs[i - 1, ids[i]] for i in range(shared, len(ids)))
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_memory_matters(model, encoded):
    program, _, weights = model
    on, off = score(program, weights, encoded), score(program, weights, encoded, ("1",))
    assert any(
        np.abs(a.log_likelihoods - b.log_likelihoods).max() > 0.01
        for a, b in zip(on, off, strict=True)
    )


def test_scores_of_another_step_are_kept_beside_the_newest(model, tmp_path):
    program, _, weights = model
    for saved in (4, 12):
        (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
    for step in (12, 4):
        score_tasks(program, weights, Letters(), TaskItems((), 100), step, tmp_path)
    for step, name in ((12, "task_scores.json"), (4, "task_scores_4.json")):
        assert json.loads((tmp_path / name).read_text())["step"] == step


def test_greedy_equals_decoding(model, encoded):
    """For what decoding gives, and for the same with its last token changed; neither draws an id
    that the tokenizer lacks, here every second one."""
    program, _, weights = model
    drawable = np.arange(VOCAB) % 2 == 0
    generator = Generator(program, weights, drawable)
    prompts = [item[0][0][: item[0][1]] for item in encoded]
    decoded = generator.complete(prompts, GenerateConfig(temperature=0.0), max_tokens=3)
    right = [[(p + d, len(p))] for p, d in zip(prompts, decoded, strict=True)]
    wrong = [[(p + d[:-1] + [(d[-1] + 1) % VOCAB], len(p))] for p, d in zip(prompts, decoded)]  # noqa: B905
    assert drawable[np.concatenate(decoded)].all()
    for rows, greedy in ((right, True), (wrong, False)):
        found = score(program, weights, rows, drawable=drawable)
        assert [s.greedy for s in found] == [greedy] * 3


def item(frequency=0, distractors=9):
    wrong = tuple(f" {n}" for n in range(distractors))
    return Item("facts", "easy", frequency, "prompt", " answer", wrong)


def scored(correct, greedy=False):
    """`correct`: the answer's log-likelihood beside a distractor's -2."""
    return ItemScore(np.array([-1.0 if correct else -3.0, -2.0]), greedy)


def test_ties_are_wrong():
    assert not ItemScore(np.array([-2.0, -2.0, -3.0]), False).correct


def test_a_summary_by_hand():
    items = [item(1)] * 100 + [item(64)] * 100
    on = [scored(i < 15) for i in range(100)] + [scored(i < 90, i < 50) for i in range(100)]
    off = [scored(i < 10) for i in range(100)] + [scored(i < 30) for i in range(100)]
    rare, often = summarise(items, on, off)
    assert (rare["frequency"], rare["items"], rare["chance"]) == (1, 100, 0.1)
    # 15 % is less than three of 3.6 % above 10 %
    assert rare["on"] == {"accuracy": 0.15, "standard_error": pytest.approx(0.0357, abs=1e-4)}
    assert rare["retained"] is None
    assert often["on_greedy"] == {"accuracy": 0.5, "standard_error": 0.05}
    assert often["retained"] == pytest.approx((0.3 - 0.1) / (0.9 - 0.1))
    assert as_row(often)[-5:] == ("90.0% ±3.0%", "50.0% ±5.0%", "30.0% ±4.6%", "0.0% ±0.0%", "25%")
    assert as_row(rare)[-1] == ""
    shown = table(
        {"step": 5, "epochs": 0.5, "off_layers": [1], "too_long": 2, "groups": [rare, often]}
    )
    assert "2 items are longer" in shown and "90.0% ±3.0%" in shown


def test_the_error_at_chance_counts_where_all_are_right():
    """Three of three: above 10 % by 0.9 and not by three of sqrt(0.09 / 3) = 0.17, so retained is
    given; of one item, 0.9 is exactly three of 0.3, so it is not."""
    many = summarise([item()] * 3, [scored(True)] * 3, [scored(True)] * 3)[0]
    assert many["retained"] == 1.0
    one = summarise([item(distractors=9)], [scored(True)], [scored(True)])[0]
    assert math.isclose(3 * math.sqrt(0.1 * 0.9), 0.9) and one["retained"] is None


class Letters:
    """A tokenizer whose tokens are characters, with "ab" as one token."""

    def encode(self, text, add_special_tokens):
        ids, i = [], 0
        while i < len(text):
            pair = text[i : i + 2] == "ab"
            ids.append(1 if pair else ord(text[i]))
            i += 2 if pair else 1
        return dataclasses.make_dataclass("Encoding", ["ids"])(ids)

    def id_to_token(self, token):
        return "ab" if token == 1 else chr(token)


def test_a_prompt_whose_last_token_changes():
    (plain, shared), (merged, earlier) = encode(
        Letters(), Item("needle", "easy", 0, "xa", "c", ("b",))
    )
    assert (plain, shared) == ([ord("x"), ord("a"), ord("c")], 2)
    assert (merged, earlier) == ([ord("x"), 1], 1)
