"""What is said of a text, against the oracles in NumPy: addresses, norms, gates, probabilities."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.explore.explorer import OTHERS, TOP, check_explores, padded_lengths
from tests.explore.explored import (
    CAPACITY,
    EXAMPLE,
    documents,
    explorer,
    tokenizer,
    trained,
)
from tests.oracle import engram, transformer
from tests.runs import configuration
from tests.tiny import tiny_config

PROMPT = "The cat,  THE hat"
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32 against float64 through three layers


@pytest.fixture(scope="module")
def oracle():
    """ids, canonical ids, rows [T, H], gates [T, M], log-probabilities with and without memory."""
    model = trained()
    config, addressing = model.program.config, model.program.addressing
    f64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    params, biases = f64(model.weights.params), f64(model.weights.router_bias)
    table, layer = np.asarray(model.weights.rows["1"], np.float64), addressing.layers[1]
    ids = np.array(tokenizer().encode(PROMPT).ids)
    canonical = addressing.compression[ids]
    rows = engram.hash_rows(canonical, layer, addressing.pad_id)
    read, own, gates = table[rows].reshape(len(ids), -1), params["engrams"]["1"], []
    eps = {"gate_eps": np.finfo(np.float32).eps}

    def remember(layer_id, x):
        gates.append(
            [
                [engram.gate(r, s, own, m, **eps) for m, s in enumerate(t)]
                for r, t in zip(read, x, strict=True)
            ]
        )
        return engram.engram(read, x, own, dilation=3, conv_eps=1e-5, **eps)

    given = params, biases, {"1": table}, ids, config, addressing
    logits = [transformer.forward(*given, f) for f in (remember, lambda layer_id, x: 0 * x)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]
    return ids, canonical, rows, np.array(gates[0]), *logs


def test_a_text_is_what_the_oracles_say(shown, oracle):
    ids, canonical, rows, gates, with_, without = oracle
    table = np.asarray(trained().weights.rows["1"], np.float64)
    found = shown.look(PROMPT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [t["id"] for t in found["tokens"]] == ids.tolist()
    assert [t["canonical"]["id"] for t in found["tokens"]] == canonical.tolist()
    assert "".join(t["text"] for t in found["tokens"]) == PROMPT
    np.testing.assert_allclose(found["gates"]["1"], gates, **CLOSE)
    divergence = (np.exp(with_) * (with_ - without)).sum(-1)
    np.testing.assert_allclose(found["effect"], divergence, rtol=2e-3, atol=1e-5)
    assert divergence.max() > 0.01 and np.ptp(gates) > 0.1  # the memory does something
    for at in range(len(ids)):
        chosen = shown.look(PROMPT, at)["chosen"]
        assert chosen["at"] == at
        (own,) = chosen["layers"]
        heads = [head for order in own["orders"] for head in order["heads"]]
        assert [head["row"] for head in heads] == rows[at].tolist()
        lengths = np.sqrt((table[rows[at]] ** 2).sum(-1))
        np.testing.assert_allclose([head["norm"] for head in heads], lengths, rtol=1e-5)
        for order in own["orders"]:  # as the page writes it down
            window = canonical[max(0, at - order["order"] + 1) : at + 1][::-1]
            back = [*window.tolist(), *[0] * (order["order"] - len(window))]
            mixed = 0
            for token, multiplier in zip(back, order["multipliers"], strict=True):
                mixed ^= token * int(multiplier)
            assert int(order["mixed"]) == mixed
            for head in order["heads"]:
                assert head["offset"] + mixed % head["prime"] == head["row"]
        best = [set(np.argsort(-x[at], kind="stable")[:TOP].tolist()) for x in (with_, without)]
        assert {n["id"] for n in chosen["next"]} == best[0] | best[1]
        for n in [*chosen["next"], *([chosen["coming"]] if chosen["coming"] else [])]:
            wanted = np.exp([with_[at, n["id"]], without[at, n["id"]]])
            np.testing.assert_allclose([n["with"], n["without"]], wanted, rtol=2e-3, atol=1e-6)
        larger = [max(n["with"], n["without"]) for n in chosen["next"]]
        assert larger == sorted(larger, reverse=True)
        coming = chosen["coming"]
        assert coming is None if at + 1 == len(ids) else coming["id"] == ids[at + 1]


def test_ngrams_and_readers_are_those_of_the_text(shown, oracle):
    """Against a loop over the documents: every head's row, and the n-grams that read it."""
    _, canonical, *_ = oracle
    addressing = trained().program.addressing
    layer, fill = addressing.layers[1], addressing.pad_id
    reads, ngrams = Counter(), {order: Counter() for order in layer.orders}
    readers: dict = {}
    for ids in documents():
        own = addressing.compression[ids]
        for t, of_token in enumerate(engram.hash_rows(own, layer, fill)):
            padded = [fill] * 2 + own.tolist()
            for head, row in enumerate(of_token.tolist()):
                order = layer.orders[head // layer.heads_per_order]
                window = tuple(padded[t + 3 - order : t + 3])
                reads[row] += 1
                readers.setdefault(row, set()).add(window)
                ngrams[order][window] += head % layer.heads_per_order == 0
    shared = 0
    for at in range(len(canonical)):
        chosen = shown.look(PROMPT, at)["chosen"]
        padded = [fill] * 2 + canonical.tolist()
        for n in chosen["ngrams"]:
            window = tuple(padded[at + 3 - n["order"] : at + 3])
            assert tuple(item["id"] for item in n["items"]) == window
            assert n["count"] == ngrams[n["order"]][window]
        for order in chosen["layers"][0]["orders"]:
            own = tuple(padded[at + 3 - order["order"] : at + 3])
            for head in order["heads"]:
                others = readers.get(head["row"], set()) - {own}
                assert head["reads"] == reads[head["row"]]
                told = [tuple(i["id"] for i in o["items"]) for o in head["others"]]
                counts = [o["count"] for o in head["others"]]
                assert len(told) == min(OTHERS, len(others)) and set(told) <= others
                assert head["othersMore"] == len(others) - len(told)
                assert counts == [ngrams[order["order"]][w] for w in told]
                left = [ngrams[order["order"]][w] for w in others - set(told)]
                assert counts == sorted(counts, reverse=True)
                assert not left or min(counts) >= max(left)
                shared += len(others)
    assert shared > 10  # the tables are small: rows are shared


def test_tokens_that_share_an_id_are_named(shown):
    found = shown.look(" the")
    (token,) = found["tokens"]
    assert token["text"] == " the" and token["canonical"]["text"] == "the"
    same = [s["text"] for s in found["chosen"]["same"]]
    ids = {tokenizer().token_to_id(t) for t in ("the", "Ġthe", "The", "ĠThe")} - {None}
    assert " the" in same and len(same) == len(ids) > 1
    assert all(s.strip().lower() == "the" for s in same)
    first = shown.look("a")["chosen"]["ngrams"][1]["items"]
    assert [item.get("start", False) for item in first] == [True, True, False]


def test_a_part_of_a_character_is_shown_as_bytes(shown):
    tokens = shown.look("é中")["tokens"]
    assert [t["bytes"] for t in tokens] == ["c3", "a9", "e4", "b8", "ad"]
    assert all("text" not in t and t["canonical"]["bytes"] == t["bytes"] for t in tokens)


def test_an_empty_text_and_what_the_page_begins_with():
    found = explorer().look("")
    assert found["tokens"] == [] and found["chosen"] is None and found["gates"] == {}
    assert found["model"]["example"] == EXAMPLE and found["model"]["capacity"] == CAPACITY
    assert found["training"]["state"] == "reading"


def test_without_counts_nothing_is_said_of_readers(shown):
    one = explorer()
    one._compiled = shown._compiled  # the same model: nothing is compiled again
    chosen = one.look("the")["chosen"]
    heads = [h for order in chosen["layers"][0]["orders"] for h in order["heads"]]
    assert {h["reads"] for h in heads} == {n["count"] for n in chosen["ngrams"]} == {None}


def test_layers_and_orders_that_are_off(shown):
    off = explorer(off_layers=(1,)).look("the cat")
    assert off["gates"] == {} and off["model"]["layers"][0]["off"]
    np.testing.assert_allclose(off["effect"], 0, atol=1e-6)
    on = shown.look("the cat")
    for n in off["chosen"]["next"]:  # both sides are the model without
        same = next((m for m in on["chosen"]["next"] if m["id"] == n["id"]), None)
        assert n["with"] == pytest.approx(n["without"], rel=1e-4)
        assert same is None or n["with"] == pytest.approx(same["without"], rel=1e-3)


@pytest.mark.parametrize(
    ("capacity", "wanted"),
    [(1, (1,)), (24, (24,)), (96, (96,)), (128, (32, 128)), (1000, (63, 250, 1000))],
)
def test_padded_lengths(capacity, wanted):
    assert padded_lengths(capacity) == wanted


def test_a_length_is_compiled_once(shown):
    shown.look("a")
    first = shown.compiled(CAPACITY)
    shown.look("a cat and a hat")
    assert shown.compiled(CAPACITY) is first and list(shown._compiled) == [CAPACITY]


@pytest.mark.parametrize(
    ("prompt", "at", "words"),
    [
        ("b " * 30, None, f"tokens; must have at most {CAPACITY}"),
        ("the", 5, "at = 5: must be a token of the text, 0 to 0"),
        ("the", -1, "at = -1: must be a token"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(shown, prompt, at, words):
    with pytest.raises(UserError, match=words) as error:
        shown.look(prompt, at)
    assert "\n" not in str(error.value)


def test_models_without_hashed_rows_are_refused():
    with pytest.raises(UserError, match=r"layers = \(\): has no memory to explore"):
        check_explores(configuration("moe_tiny"))
    scone = {"model.engram.form": "scone", "model.engram.layers": (0,)}
    scone |= {"model.engram.heads_per_order": 1, "tokenizer.canonical_vocab_size": 0}
    with pytest.raises(UserError, match="'scone': its rows stand for no hash"):
        check_explores(tiny_config(**scone))
    check_explores(configuration("engram_tiny"))
