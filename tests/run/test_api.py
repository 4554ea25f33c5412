"""The Python interface: what it gives is what launch.py gives for the same run, to the bit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from engram_jax import api
from engram_jax.addressing import load_tokenizer
from engram_jax.addressing.hash_numpy import addresses as hashed
from engram_jax.addressing.hash_numpy import canonicalise
from engram_jax.config import to_dict
from engram_jax.monitoring.metrics import read_metrics
from engram_jax.run.ancestry import find_ancestor
from tests.oracle import engram as oracle
from tests.oracle import transformer
from tests.run.test_resume import copy_of
from tests.runs import ROOT, SMALL, launched, small_config, small_run

PROMPT = "abcd"
KEYS = {"generate__max_tokens": 10, "generate__temperature": 0.9}


@pytest.fixture(scope="module")
def run(undisturbed):
    return api.open_run(undisturbed, 24)


@pytest.fixture(scope="module")
def held_out(run):
    return api.run_documents(run)


def test_the_loss_is_that_of_evaluate(corpus, undisturbed, run, held_out, tmp_path):
    part = copy_of(undisturbed, tmp_path)
    told = launched(*small_run(corpus, part), "--mode=evaluate", "--step=24", "--json")
    found = api.evaluate(run.model, run.state, held_out)
    theirs = json.loads(told.out)
    assert found.loss == theirs["held_out_loss"] and found.targets == theirs["held_out_targets"]
    documents = np.load(part / "held_out_documents.npz")
    assert [len(nats) for nats in found.nats] == documents["targets"].tolist()
    assert [len(d) - 1 for d in held_out] == documents["targets"].tolist()
    np.testing.assert_allclose([nats.sum() for nats in found.nats], documents["nats"], rtol=1e-12)


def test_training_is_that_of_a_run(corpus, undisturbed, run):
    """In two parts, which are one, from a tokenizer's object."""
    documents = api.run_documents(run, held_out=False)
    tokenizer = Tokenizer.from_file(str(undisturbed / "tokenizer.json"))
    model = api.build(to_dict(small_config(corpus)), tokenizer)
    state, heard = api.init(model), []
    state, first = api.train(model, state, documents, 2, lambda n, found: heard.append(n))
    state, rest = api.train(model, state, documents, 4, lambda n, found: heard.append(n))
    theirs = [r["loss"] for r in read_metrics(undisturbed) if "loss" in r][:6]
    assert np.concatenate([first, rest]).astype(np.float32).tolist() == [
        np.float32(loss) for loss in theirs
    ]
    assert heard == [1, 2, 3, 4, 5, 6] and int(state.step) == 6
    # The next step by hand.
    batch = next(api.batches(model, documents, start=6))
    state, metrics = api.train_step(model, state, batch)
    seventh = [r for r in read_metrics(undisturbed) if "loss" in r][6]
    assert np.float32(seventh["loss"]) == metrics["loss"] and int(state.step) == 7
    # A step that is not finite changes nothing, and ends the loop with the state before it.
    good = np.asarray(state.params["embedding"])
    broken = {**state.params, "embedding": state.params["embedding"] * np.nan}
    with pytest.raises(api.UserError, match=r"step 7: loss nan, .* not finite") as error:
        api.train(model, dataclasses.replace(state, params=broken), documents, 3)
    kept = error.value.state
    assert int(kept.step) == 7 and not kept.halted
    mended = dataclasses.replace(kept, params={**kept.params, "embedding": jax.numpy.asarray(good)})
    mended, (loss,) = api.train(model, mended, documents, 1)
    eighth = [r for r in read_metrics(undisturbed) if "loss" in r][7]
    assert np.float32(eighth["loss"]) == np.float32(loss)


def test_a_text_is_that_of_generate(corpus, undisturbed, run):
    changed = {"generate.max_tokens": 10, "generate.temperature": 0.9}
    model = dataclasses.replace(
        run.model,
        program=dataclasses.replace(
            run.model.program, config=api.configure(run.model.config, changed)
        ),
    )
    (found,) = api.generate(model, run.state, [PROMPT])
    told = launched(
        *small_run(corpus, undisturbed, **KEYS), "--mode=generate", f"--prompt={PROMPT}"
    )
    assert told.out == f"{PROMPT}{found.text}\n" and len(found.tokens) > 4
    ids = load_tokenizer(undisturbed).encode(PROMPT, add_special_tokens=False).ids
    assert api.generate(model, run.state, [ids]) == [found]
    assert len(model.engine_steps) == 1  # compiled once


@pytest.fixture(scope="module")
def short(run, held_out):
    """A document of one sequence, and the model's parts in float64 for the oracle."""
    ids = held_out[0][:16]
    as64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
    params, bias = as64(run.state.params), as64(run.state.router_bias)
    tables = {k: np.asarray(t.rows, np.float64) for k, t in run.state.memory.items()}
    return ids, params, bias, tables


def engram_of(short, program, seen=None, heads=slice(None)):
    """The oracle's Engram layer, for `transformer.forward`. heads: whose rows are not zero."""
    ids, params, _, tables = short
    addressing = program.addressing

    def added(layer, streams):
        own, canonical = addressing.layers[layer], addressing.compression[ids]
        rows = tables[str(layer)][oracle.hash_rows(canonical, own, addressing.pad_id)]
        kept = np.zeros_like(rows)
        kept[:, heads] = rows[:, heads]
        mine = params["engrams"][str(layer)]
        out = oracle.engram(
            kept.reshape(len(ids), -1),
            streams,
            mine,
            dilation=own.max_ngram,
            gate_eps=np.finfo(np.float32).eps,
            conv_eps=1e-5,
        )
        if seen is not None:
            seen[layer] = streams, out
        return out

    return added


def test_what_the_memory_reads_and_adds(run, short):
    ids, params, bias, tables = short
    program, seen = run.model.program, {}
    transformer.forward(
        *(params, bias, tables, ids, program.config, program.addressing),
        engram_of(short, program, seen),
    )
    (layer,) = seen
    found = api.read_memory(run.model, run.state, ids)[layer]
    own = program.addressing.layers[layer]
    wanted = hashed(canonicalise(ids, program.addressing.compression), own)
    assert np.array_equal(found.addresses, wanted)
    assert np.array_equal(api.addresses(run.model, ids)[layer], wanted)
    assert np.array_equal(found.rows, tables[str(layer)][wanted])
    streams, added = seen[layer]
    np.testing.assert_allclose(found.added, added, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.streams, streams, rtol=1e-3, atol=1e-5)
    assert np.array_equal(api.canonical_ids(run.model, ids), program.addressing.compression[ids])
    plan = api.hash_plan(run.model)[layer]
    x = [program.addressing.pad_id, *api.canonical_ids(run.model, ids).tolist()]
    mixed = x[2] * plan.multipliers[0] ^ x[1] * plan.multipliers[1]  # the docstring's formula
    assert plan.offsets[1] + mixed % plan.head_sizes[1] == wanted[1, 1]
    mine, eps = params["engrams"][str(layer)], np.finfo(np.float32).eps
    projection, branches = mine["projection"], streams.shape[1]
    for t in range(len(ids)):
        for m in range(branches):
            key = found.rows[t].reshape(-1) @ projection[:, m] + mine["bias"][m]
            q = oracle.rms_norm(streams[t, m], mine["query_norm"]["gain"][m], eps)
            k = oracle.rms_norm(key, mine["key_norm"]["gain"][m], eps)
            s = q @ k / np.sqrt(len(q))
            gate = oracle.sigmoid(np.sign(s) * np.sqrt(max(abs(s), 1e-6)))
            assert found.gates[t, m] == pytest.approx(gate, abs=1e-3)
    slots = api.slots(run.model, ids[3:6])[layer]  # in the text, and by themselves
    assert {n: rows.tolist() for n, rows in slots.items()} == {
        2: wanted[5, :2].tolist(),
        3: wanted[5, 2:].tolist(),
    }
    assert list(api.slots(run.model, ids[4:6])[layer]) == [2]


@pytest.mark.parametrize("off", [{"layers": [1]}, {"orders": [3]}], ids=str)
def test_what_is_switched_off_adds_nothing(run, short, off):
    ids, params, bias, tables = short
    program = run.model.program
    memory = engram_of(short, program, heads=slice(0, 2))  # order 2 alone
    if "layers" in off:
        memory = lambda layer, streams: 0.0 * streams  # noqa: E731
    logits = transformer.forward(
        params, bias, tables, ids, program.config, program.addressing, memory
    )
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -logs[np.arange(len(ids) - 1), ids[1:]]
    model = api.switch_off(run.model, **off)
    found = api.evaluate(model, run.state, [ids])
    np.testing.assert_allclose(found.nats[0], wanted, rtol=1e-3, atol=1e-4)
    assert abs(found.nats[0] - api.evaluate(run.model, run.state, [ids]).nats[0]).max() > 1e-3
    if "layers" in off:
        assert api.read_memory(model, run.state, ids) == {}
    else:  # the engine means the same by it
        params = api.SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True)
        (scored,) = api.generate(model, run.state, [ids], params)
        mine = [-entry.logprob for entry in scored.prompt_logprobs]
        np.testing.assert_allclose(mine, found.nats[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(api.UserError, match="is trained with all that it has"):
        api.train_step(model, run.state, {})


def test_evaluate_takes_the_switches_too(corpus, undisturbed, run, held_out):
    off = api.evaluate(api.switch_off(run.model, layers=[1]), run.state, held_out)
    before = (undisturbed / "held_out_documents.npz").read_bytes()
    arguments = small_run(corpus, undisturbed, serve__off_layers=(1,))
    told = launched(*arguments, "--mode=evaluate", "--json")
    found = json.loads(told.out)
    assert found["held_out_loss"] == off.loss and found["off_layers"] == [1]
    assert "documents" not in found
    assert (undisturbed / "held_out_documents.npz").read_bytes() == before


def test_what_is_saved_is_a_run(corpus, undisturbed, run, held_out, tmp_path):
    workdir = api.save_run(run.model, run.state, tmp_path / "saved", held_out)
    again = api.open_run(workdir)
    assert again.step == 24
    jax.tree.map(np.testing.assert_array_equal, again.state, run.state)
    told = launched(*small_run(corpus, workdir, **KEYS), "--mode=generate", f"--prompt={PROMPT}")
    theirs = launched(
        *small_run(corpus, undisturbed, **KEYS), "--mode=generate", f"--prompt={PROMPT}"
    )
    assert told.code == 0 and told.out == theirs.out
    for arguments, words in (
        (["--mode=evaluate"], "add --accept_changes=data"),
        (
            ["--config.train.steps=30", "--accept_changes=train.steps"],
            "the run there was trained on another text: arrays of tokens",
        ),
    ):
        outcome = launched(*small_run(corpus, workdir), *arguments)
        assert outcome.code == 2 and words in outcome.err.splitlines()[-1]
    child = small_config(corpus, train__init_from=str(workdir))
    assert find_ancestor(child, tmp_path / "child").step == 24
    with pytest.raises(api.UserError, match="has a checkpoint of step 24; the state's is 24"):
        api.save_run(run.model, run.state, workdir)
    other = dataclasses.replace(
        run.model,
        program=dataclasses.replace(
            run.model.program, config=api.configure(run.model.config, {"train.seed": 5})
        ),
    )
    with pytest.raises(api.UserError, match=r"config.train.seed is 0 there and 5 here"):
        api.save_run(other, run.state, workdir)


def test_another_text_is_refused(corpus, undisturbed, tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("1", "2", "3"):
        (tmp_path / "other" / name).write_text(f"another text {name} " * 30)
    run = api.open_run(undisturbed, changes={"data.path": str(tmp_path / "other")})
    with pytest.raises(api.UserError, match="text is not the one"):
        api.run_documents(run)


OWN = SMALL | {"data.source": "local"}


def numbers(**changes):
    """A model of token ids alone."""
    keys = {"tokenizer.vocab_size": 40, "model.engram.compression": False, **changes}
    return api.build(api.configure(OWN, keys))


ONE = np.arange(20)
NO_MEMORY = {"model.engram.layers": ()}
WRONG = [
    (lambda: api.configure("nowhere.py"), "configuration=nowhere.py: no such file"),
    (lambda: api.configure(5), "configuration: is int, must be a file, a ConfigDict or a mapping"),
    (lambda: api.configure(None, {"model.layer": 2}), "config.model.layer: unknown key"),
    (lambda: api.configure(None, {"train.steps.x": 2}), "config.train.steps is a value"),
    (lambda: api.configure(None, {"train": 2}), "config.train = 2: must be a section with keys"),
    (lambda: api.configure(None, {"train.steps": 0}), "config.train.steps = 0: must be"),
    (lambda: api.build(OWN), "config.model.engram.compression = True: is made from a tokenizer"),
    (lambda: api.build(OWN, "none.json"), "tokenizer none.json: no such file"),
    (
        lambda: api.build(OWN, Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
        "no end-of-document token",
    ),
    (lambda: api.encode(numbers(), ["a"]), "texts: the model has no tokenizer"),
    (lambda: api.batches(numbers(), "abc"), "documents: must be a list of documents"),
    (lambda: api.batches(numbers(), []), "documents: there is none"),
    (lambda: api.batches(numbers(), ["abc"]), r"documents\[0\]: is 'abc'; must be token ids"),
    (lambda: api.batches(numbers(), [ONE, [0.5]]), r"documents\[1\]: is float64 of shape \[1\]"),
    (lambda: api.batches(numbers(), [[[1]]]), r"documents\[0\]: is int64 of shape \[1, 1\]"),
    (lambda: api.batches(numbers(), [ONE, []]), r"documents\[1\]: is float64 of shape \[0\]"),
    (lambda: api.batches(numbers(), [ONE + 30]), r"documents\[0\]: token id 49: must be from 0"),
    (lambda: api.batches(numbers(), [ONE]), "fewer than config.data.batch_size = 4"),
    (lambda: api.evaluate(numbers(), None, [[1], [2]]), "documents: no token to predict"),
    (lambda: api.train_step(numbers(), None, {}), "batch: has no 'tokens'; must have tokens"),
    (
        lambda: api.train_step(numbers(), None, {"tokens": np.zeros((4, 15))}),
        r"batch\['tokens'\]: is of shape \[4, 15\], must be \[4, 16\]",
    ),
    (lambda: api.addresses(numbers(), "text"), "tokens: is text, and the model has no tokenizer"),
    (lambda: api.addresses(numbers(), [40]), "tokens: token id 40: must be from 0 to 39"),
    (lambda: api.addresses(numbers(), []), "tokens: must be a text or token ids"),
    (lambda: api.slots(numbers(), [1]), r"ngram: is 1 token\(s\), must be 2 at least"),
    (lambda: api.canonical_ids(numbers(), [40]), "tokens: token id 40: must be from 0 to 39"),
    (lambda: api.hash_plan(numbers(**NO_MEMORY)), "the model has no memory"),
    (lambda: api.solve(OWN, OWN, 2.0), r"rho = 2: must be from .* routed experts"),
    (lambda: api.switch_off(numbers(), layers=[0]), "layers: 0 is no Engram layer; there are 1"),
    (lambda: api.switch_off(numbers(), orders=[4]), "config.serve.off_orders = 4"),
    (lambda: api.generate(numbers(), None, "abc"), "prompts: is one text; must be a list"),
    (lambda: api.generate(numbers(), None, [[]]), r"prompts\[0\]: must be a text or token ids"),
    (lambda: api.generate(numbers(), None, [[1]], []), "params: 0 for 1 prompts"),
    (
        lambda: api.generate(numbers(**{"serve.memory": "host"}), None, [[1]]),
        "config.serve.memory = 'host': generate",
    ),
    (lambda: api.save_run(numbers(), None, "x"), "model: has no tokenizer that ends documents"),
    (lambda: api.open_run("/none"), "--workdir=/none: no trained model there"),
    (lambda: api.open_run("gs://a/b"), "must be a path of this machine's file system"),
]


@pytest.mark.parametrize(("call", "told"), WRONG, ids=lambda x: x[:50] if x == str(x) else "")
def test_mistakes_are_one_line(call, told):
    with pytest.raises(api.UserError, match=told) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_setting_of_jax_that_changes_draws_is_refused():
    if not hasattr(jax.config, "jax_threefry_partitionable"):
        pytest.skip("this JAX has no such setting")
    with jax.threefry_partitionable(False), pytest.raises(api.UserError, match="must be True"):
        numbers()


def test_another_generator_by_default_changes_nothing():
    """Keys say which generator they are of."""
    from engram_jax.config import random_streams

    plain = jax.random.uniform(random_streams.stream(7, "params"))
    with jax.default_prng_impl("rbg"):
        assert jax.random.uniform(random_streams.stream(7, "params")) == plain


LIGHT = """
import sys
from engram_jax import api
assert "jax" not in sys.modules and "numpy" not in sys.modules
assert set(api.__all__) == set(dir(api)) == set(api._HOME)
"""


def test_importing_it_loads_nothing():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in api.__all__:
        assert getattr(api, name).__doc__
