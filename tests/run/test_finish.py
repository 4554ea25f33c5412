"""What a finished run shows: that it is shown of the right text, and is refused in time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from engram_jax.addressing import BatchAddresser
from engram_jax.checkpoint.load_model import load_model
from engram_jax.data.run_data import open_data
from engram_jax.evaluation.held_out import Evaluator
from engram_jax.run.end_of_run import gate_sample
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
