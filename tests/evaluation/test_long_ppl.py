"""LongPPL's rule, texts and sums against the NumPy model and loops over tokens."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.evaluation.key_tokens import (
    Encoded,
    Rule,
    cut,
    inside,
    key_tokens,
    short_parts,
    spans_of,
)
from engram_jax.evaluation.long_ppl import (
    Piece,
    Settings,
    key_spans,
    rule_of,
    summary,
    table,
    whole_nats,
)
from engram_jax.evaluation.part_scorer import PartScorer, pack
from tests.oracle import transformer as oracle
from tests.tiny import VOCAB, tiny

LENGTHS = (24, 9, 17)
RULE = Rule(context=24, truncated=2, stride=2)


@pytest.fixture(scope="module")
def model():
    """The tiny model with an embedding twelve times as large: losses differ by nats."""
    program, state = tiny()
    params = state.params | {"embedding": 12 * state.params["embedding"]}
    return program, dataclasses.replace(state, params=params)


@pytest.fixture(scope="module")
def nats_behind(model):
    """ids -> nats of every token behind them, by the NumPy model."""
    program, state = model
    to64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    tables = {k: np.asarray(t.rows, np.float64) for k, t in state.memory.items()}
    given = to64(state.params), to64(state.router_bias), tables

    def nats(ids):
        logits = oracle.forward(*given, np.array(ids), program.config, program.addressing)[-1]
        return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits

    return nats


@pytest.fixture(scope="module")
def scorer(model):
    program, state = model
    parts = state.params, state.router_bias, state.memory
    scored = SimpleNamespace(program=program, params=parts[0], router_bias=parts[1])
    scored.memory = parts[2]
    return PartScorer(scored, RULE.context)


@pytest.fixture(scope="module")
def pieces(nats_behind):
    """Texts whose token i is the characters 2 i and 2 i + 1, every second token what the model
    finds likeliest behind all that precedes it."""
    rng = np.random.default_rng(3)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        for at in range(RULE.truncated, length, 2):
            ids[at] = np.argmin(nats_behind(ids[:at]))
        offsets = 2 * np.arange(length)[:, None] + np.array([0, 2])
        encoded = Encoded(ids, offsets)
        found.append(Piece(number, encoded, encoded))
    return found


def test_key_tokens_by_brute_force(scorer, nats_behind, pieces):
    """Every token's loss from a forward pass of its own, behind all that precedes it and behind the
    truncated context."""
    whole = whole_nats(scorer, [piece.model.ids for piece in pieces])
    spans = key_spans(scorer, pieces, RULE)
    keys, losses = [], []
    for piece, nats, own in zip(pieces, whole, spans, strict=True):
        ids, characters, of_text = piece.model.ids, set(), []
        for at in range(1, len(ids)):
            full = nats_behind(ids[:at])[ids[at]]
            assert nats[at - 1] == pytest.approx(full, rel=1e-4, abs=1e-4)
            if at < RULE.truncated:
                continue
            start = (at - RULE.truncated) // RULE.stride * RULE.stride
            short = nats_behind(ids[start:at])[ids[at]]
            assert min(abs(short - full - 2), abs(full - 2)) > 1e-3  # rounding decides nothing
            if short - full > 2 and full < 2:
                characters |= {2 * at, 2 * at + 1}
                of_text.append(full)
        assert {c for low, high in own for c in range(low, high)} == characters
        keys.append(inside(piece.model.offsets, own)[1:])
        losses += of_text
    assert len(losses) >= 2  # the rule chooses some, and not all
    told = summary(np.arange(3), whole, keys)
    assert told["key_tokens"] == len(losses) < told["tokens"] == sum(LENGTHS) - 3
    assert told["long_ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


@pytest.mark.parametrize(("length", "truncated", "stride"), [(24, 4, 3), (5, 4, 3), (10, 4, 6)])
def test_each_token_is_predicted_once_behind_a_truncated_context(length, truncated, stride):
    seen = []
    for part in short_parts(length, Rule(32, truncated, stride)):
        for at in range(part.first, part.end):
            assert truncated <= at - part.start < truncated + stride
            seen.append(at)
        assert part.start % stride == 0
    assert seen == list(range(truncated, length))
    assert short_parts(truncated, Rule(32, truncated, stride)) == []


def test_both_thresholds_are_strict():
    whole = np.array([1.0, 1.0, 2.0, 1.999, 0.5])
    truncated = np.array([3.0, 3.001, 9.0, 9.0, 2.4])
    assert key_tokens(whole, truncated).tolist() == [False, True, False, True, False]


def test_key_text_of_another_tokenizer():
    """Tokens that touch are one text; what reaches out of it is not key."""
    key = np.array([[2, 4], [4, 7], [9, 10], [9, 10], [12, 15]])
    spans = spans_of(key)
    assert spans.tolist() == [[2, 7], [9, 10], [12, 15]]
    other = np.array([[0, 2], [2, 3], [3, 7], [7, 9], [8, 10], [9, 10], [10, 13], [12, 15]])
    wanted = [any(a <= low and high <= b for a, b in spans) for low, high in other]
    assert inside(other, spans).tolist() == wanted
    assert wanted == [False, True, True, False, False, True, False, True]
    assert not inside(other, spans_of(key[:0])).any()


def words(text):
    """A token for each word with the blanks before it; of a word of more than 3 letters the last
    two are another one, so that a cut changes tokens."""
    found, at = [], 0
    for number, part in enumerate(text.split(" ")):
        size = len(part) + (number > 0)
        if len(part) > 3:
            found += [(at, at + size - 2), (at + size - 2, at + size)]
        elif size:
            found.append((at, at + size))
        at += size
    return Encoded(np.zeros(len(found), np.int32), np.array(found, np.int64).reshape(-1, 2))


def letters(text):
    ends = np.arange(len(text))
    return Encoded(np.zeros(len(text), np.int32), np.stack([ends, ends + 1], axis=1))


@pytest.mark.parametrize("encoders", [[words], [letters], [words, letters]])
def test_a_document_is_cut_into_texts_that_fit(encoders):
    rng = np.random.default_rng(0)
    text = " ".join("abcdefgh"[: rng.integers(1, 8)] for _ in range(200))
    found = list(cut(text, encoders, 12))
    assert "".join(found) == text
    counts = [max(len(encode(part).ids) for encode in encoders) for part in found]
    assert max(counts) <= 12 and min(counts[:-1]) >= 10
    assert list(cut("", encoders, 12)) == []


def test_pieces_share_sequences():
    places, rows = pack([5, 3, 1, 8, 2, 6, 7], 8)
    assert places == [(0, 0), (0, 5), (1, 0), (2, 0), (3, 0), (3, 2), (4, 0)] and rows == 5


def test_sums_and_errors():
    """Over documents; of one document over its texts; by loops."""
    rng = np.random.default_rng(1)
    nats = [rng.gamma(2.0, 1.0, size) for size in (5, 9, 4, 7)]
    keys = [rng.random(len(each)) < 0.5 for each in nats]

    def expected(values, groups):
        mean = np.concatenate(values).mean()
        names = sorted(set(groups))
        sums = [
            sum((v - mean).sum() for v, g in zip(values, groups, strict=True) if g == name)
            for name in names
        ]
        n, size = len(names), sum(map(len, values))
        error = math.sqrt(n / (n - 1) * sum(s * s for s in sums)) / size
        return math.exp(mean), math.exp(mean) * error

    for documents, groups in (((0, 0, 1, 2), (0, 0, 1, 2)), ((4, 4, 4, 4), (0, 1, 2, 3))):
        told = summary(np.array(documents), nats, keys)
        for key, values in (
            ("perplexity", nats),
            ("long_ppl", [v[k] for v, k in zip(nats, keys, strict=True)]),
        ):
            value, error = expected(values, groups)
            assert told[key] == pytest.approx(value, rel=1e-12)
            assert told[f"{key}_stderr"] == pytest.approx(error, rel=1e-9)
    none = summary(np.array([0]), nats[:1], [np.zeros(5, bool)])
    assert none["long_ppl"] is None and none["key_tokens"] == 0
    assert none["perplexity_stderr"] is None
    shown = {"name": "a", "step": 1, "evaluator": "b", "texts": {"t": none}}
    assert "-" in table(shown | dataclasses.asdict(RULE)).splitlines()[-1]


def test_lengths():
    """The published ones at 32,768, an eighth and a thirty-second below, no more above."""
    texts = ("a=b",)
    assert rule_of(Settings(texts), 32_768) == Rule(32_768, 4096, 1024)
    assert rule_of(Settings(texts), 131_072) == Rule(131_072, 4096, 1024)
    assert rule_of(Settings(texts, context=2048), 256) == Rule(2048, 256, 64)
    assert rule_of(Settings(texts, truncated=7, stride=2), 16) == Rule(16, 7, 2)
    for wrong, words in (
        ({"truncated": 16}, "--truncated=16: must be less than --context=16"),
        ({"truncated": 10, "stride": 7}, "--stride=7: must be at most 6"),
    ):
        with pytest.raises(UserError, match=words):
            rule_of(Settings(texts, **wrong), 16)
