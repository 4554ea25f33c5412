"""What has no held-out target has no held-out loss: refused before training, not scored as 0."""

from __future__ import annotations

import dataclasses
import math

import pytest

from engram_jax.config.errors import UserError
from engram_jax.data.run_data import open_data
from engram_jax.data.token_store import TokenStore, write_store
from engram_jax.evaluation.held_out import Evaluator, check_held_out, perplexity
from engram_jax.run import loop
from engram_jax.training.state import build_training
from tests.runs import small_config


@pytest.fixture(scope="module")
def data(corpus):
    return open_data(small_config(corpus), log=lambda line: None)


def held_out(data, texts, folder):
    """`data` with these held-out documents; of an empty one its end alone is left."""
    folder.mkdir()
    prepared, size = data.prepared, data.config.tokenizer.vocab_size
    write_store(folder, texts, prepared.tokenizer, prepared.eos_id, size)
    prepared = dataclasses.replace(prepared, store_valid=TokenStore(folder))
    return dataclasses.replace(data, prepared=prepared)


def test_no_loss_without_a_held_out_target(data, tmp_path):
    none = held_out(data, ["", "", ""], tmp_path / "none")
    evaluator = Evaluator(build_training(data.config, data.addressing), none)
    for batches in (None, 2):
        with pytest.raises(
            UserError, match=r"held-out text \(3 documents, 3 tokens\) has no token"
        ):
            evaluator.score(None, batches)


def test_training_does_not_begin_where_its_evaluations_have_no_target(data, tmp_path, monkeypatch):
    """The first 2 batches of 64 positions are ends of empty documents."""
    later = held_out(data, [*[""] * 200, "a few words"], tmp_path / "later")
    check_held_out(later)
    monkeypatch.setattr(loop, "open_on_all_processes", lambda config, log, **_: later)
    workdir = tmp_path / "workdir"
    with pytest.raises(UserError, match=r"the first 2 batches .* config\.train\.eval_batches"):
        loop.train(data.config, workdir, log=lambda line: None)
    assert not list(workdir.rglob("*"))


def test_perplexity_of_any_loss():
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(710.0) == perplexity(math.inf) == math.inf and math.isnan(
        perplexity(math.nan)
    )


def test_f_grams_are_counted_where_they_are_wanted(corpus):
    """Another text than the run's may have fewer n-grams than the run has rows."""
    keys = {"form": "scone", "layers": (0,), "heads_per_order": 1, "rows_per_head": (10**6,)}
    overrides = {f"model.engram.{key}": value for key, value in keys.items()}
    config = small_config(corpus, **overrides)
    with pytest.raises(UserError, match="rows_per_head = 1000000: must be at most"):
        open_data(config, log=lambda line: None)
    found = open_data(config, log=lambda line: None, count_fgrams=False).addressing
    assert found.layers[0].ngrams is None and found.layers[0].count == 10**6
