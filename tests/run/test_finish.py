"""What a finished run shows: that it is shown of the right text, and is refused in time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from engram_jax.addressing import BatchAddresser
from engram_jax.checkpoint.load_model import load_model
from engram_jax.data.run_data import open_data
from engram_jax.evaluation.held_out import Evaluator
from engram_jax.memory.table import Table
from engram_jax.run.end_of_run import gate_sample
from engram_jax.training.state import build_training, create_state
from tests.runs import launched, small_config, small_run


@pytest.mark.parametrize("longest", [30, 10_000])
def test_gates_are_those_of_one_document(corpus, undisturbed, monkeypatch, longest):
    """As long as asked for, cut off at its end or not; nothing of its neighbours plays a part."""
    monkeypatch.setattr("engram_jax.run.end_of_run.GATE_TOKENS", longest)
    config = small_config(corpus)
    data, trained = open_data(config, log=lambda line: None), load_model(config, undisturbed)
    sample = gate_sample(data, Evaluator(trained.program, data), trained.weights)
    store = data.prepared.store_valid
    documents = [
        store.tokens[start : end - 1].tolist()
        for start, end in zip(store.starts[:-1], store.starts[1:], strict=True)
    ]
    enough = [ids for ids in documents if len(ids) >= longest]
    ids = enough[0][:longest] if enough else max(documents, key=len)
    text = trained.tokenizer.decode(ids)
    assert "".join(sample.tokens) == text and text.startswith("document ")
    # The same document as the only one of a padded batch, with the addresses written down anew.
    tokens = np.asarray([ids], np.int32)
    addresses = BatchAddresser(data.addressing)(tokens)
    rows = {k: trained.weights.rows[k][a] for k, a in addresses.items()}
    model = trained.program.model(trained.weights.params, trained.weights.router_bias)
    ones = jnp.ones(tokens.shape, jnp.int32)
    output = model(jnp.asarray(tokens), rows, jnp.arange(len(ids))[None], ones)
    np.testing.assert_allclose(
        sample.gates, [np.mean(output.gates["1"][0], axis=-1)], rtol=1e-5, atol=1e-6
    )


def test_losses_by_document_and_context(corpus, undisturbed, tmp_path):
    """They add up to the held-out loss; evaluating the checkpoint gives the same again."""
    record = json.loads((undisturbed / "losses.json").read_text())
    loss = record["held_out_loss"]
    total = loss["nats_per_token"]["engram_tiny"] * loss["targets"]
    with np.load(undisturbed / "held_out_documents.npz") as archive:
        found = dict(archive)
    assert found["targets"].sum() == loss["targets"]
    assert found["nats"].sum() == pytest.approx(total, rel=1e-12)
    config = small_config(corpus)
    data, trained = open_data(config, log=lambda line: None), load_model(config, undisturbed)
    state = dataclasses.replace(
        create_state(build_training(config, data.addressing)),
        params=trained.weights.params,
        router_bias=trained.weights.router_bias,
        memory={k: Table(rows, rows, rows) for k, rows in trained.weights.rows.items()},
    )
    score = Evaluator(trained.program, data).score(state)  # sums of batches, by another program
    assert score.targets == loss["targets"]
    assert score.loss * score.targets == pytest.approx(total, rel=1e-6)
    for k, order in enumerate(found["orders"]):
        sides = loss["by_context_ngram"][str(order)]
        assert sides["seen"]["targets"] == found["seen_targets"][:, k].sum()
        assert sides["seen"]["targets"] + sides["unseen"]["targets"] == loss["targets"]
        for name, mean in loss["nats_per_token"].items():
            parts = [
                s["targets"] * s["nats_per_token"][name] for s in sides.values() if s["targets"]
            ]
            assert sum(parts) == pytest.approx(mean * loss["targets"])
    assert "2-gram seen" in (undisturbed / "report.md").read_text()

    workdir = tmp_path / "copy"
    shutil.copytree(undisturbed, workdir)
    (workdir / "held_out_documents.npz").unlink()
    outcome = launched(f"--workdir={workdir}", "--mode=evaluate", "--json")
    result = json.loads(outcome.out.splitlines()[-1])
    assert result["documents"] == str(workdir / "held_out_documents.npz")
    with np.load(result["documents"]) as archive:
        for name, expected in found.items():
            np.testing.assert_allclose(archive[name], expected, rtol=1e-6, err_msg=name)
    for order, sides in result["by_context_ngram"].items():
        for side, of in sides.items():
            assert of["targets"] == loss["by_context_ngram"][order][side]["targets"]


def test_rows_are_read_as_often_as_the_addresses_say(corpus, undisturbed):
    config = small_config(corpus)
    data, steps = open_data(config, log=lambda line: None), config.train.steps
    addresses = [
        BatchAddresser(data.addressing)(batch["tokens"], batch["segments"])["1"]
        for batch in islice(data.train_iterator(), steps)
    ]
    used = json.loads((undisturbed / "losses.json").read_text())["memory"]["1"]
    rows = data.addressing.layers[1].rows
    lookups = np.size(addresses)
    assert used["rows"] == rows
    assert used["tokens_per_row"] == pytest.approx(steps * 4 * 16 / rows)
    assert used["lookups_per_row"] == pytest.approx(lookups / rows)
    # A row without a gradient in any step was not trained: what only ends of documents read.
    assert 0.9 * len(np.unique(addresses)) < used["touched_rows"] <= len(np.unique(addresses))
    assert used["lookups_per_touched_row"] == pytest.approx(lookups / used["touched_rows"])


def test_a_prompt_that_is_no_token_is_refused_before_training(corpus, undisturbed, tmp_path):
    tokenizer = Tokenizer.from_file(str(undisturbed / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("?", "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = small_run(
        corpus,
        tmp_path / "run",
        tokenizer__path=tmp_path / "tokenizer.json",
        train__samples=("a", "??"),
    )
    outcome = launched(*arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: config.train.samples: '??' is no token")
    assert not (tmp_path / "run").exists()


def test_a_sample_longer_than_what_is_trained_on_is_refused_before_training(corpus, tmp_path):
    fits = {"train__samples": ("a", "aaa"), "train__sample_tokens": 16}
    outcome = launched(*small_run(corpus, tmp_path / "run", **fits))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    start = "error: config.train.sample_tokens = 16: must be at most 15, what the 1 tokens of 'a'"
    assert outcome.err.startswith(start) and "data.seq_len = 16" in outcome.err
    assert not (tmp_path / "run").exists()
