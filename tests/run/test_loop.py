"""A finished run: what it wrote, what it says of itself, and what the other modes make of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.checkpoint import run_record
from engram_jax.checkpoint.load_model import load_model
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.workdir import locked
from engram_jax.config import Config, to_dict
from engram_jax.data.run_data import RunData, open_data
from engram_jax.evaluation.count_models import fit_and_score
from engram_jax.model import describe
from engram_jax.model.decode import Generator
from engram_jax.monitoring.metrics import read_metrics
from engram_jax.run import loop
from engram_jax.training.state import build_training
from tests.monitoring.test_metrics import events
from tests.runs import launched, small_config, small_run

EVERY_STEP = {
    "step": (),
    "time": (),
    "loss": (),
    "grad_norm": (),
    "grad_norm_memory": (),
    "learning_rate": (),
    "expert_load/1": (4,),
    "gate/1": (2,),
    "rows_touched/1": (),
    "hit_rate/1": (),
    "distinct/1": (),
    "extra_rounds/1": (),
}
FROM_THE_SECOND = {
    "step_seconds": (),
    "step_seconds/p50": (),
    "step_seconds/p90": (),
    "step_seconds/p99": (),
    "step_seconds/max": (),
    "tokens_per_second": (),
    "tokens_per_second_per_device": (),
    "goodput": (),  # and no "mfu": a CPU's peak is unknown
}
EVALUATION = {
    "step": (),
    "time": (),
    "validation_loss": (),
    "validation_targets": (),
    "utilisation/1": (),
}
AT_THE_END = {"step": (), "time": (), "held_out_loss": (), "held_out_targets": ()}


def shapes(record: dict) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in record.items()}


def best_step(workdir: Path) -> int:
    """The step of the lowest logged validation loss."""
    records = [r for r in read_metrics(workdir) if "validation_loss" in r]
    return min(records, key=lambda r: r["validation_loss"])["step"]


@pytest.fixture(scope="module")
def config(corpus) -> Config:
    return small_config(corpus)


@pytest.fixture(scope="module")
def data(config) -> RunData:
    return open_data(config, log=lambda line: None)


def test_every_metric_at_every_step(undisturbed):
    records = read_metrics(undisturbed)
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "validation_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 25))
    assert [r["step"] for r in evaluations] == [12, 24]
    assert shapes(steps[0]) == EVERY_STEP
    assert all(shapes(r) == EVERY_STEP | FROM_THE_SECOND for r in steps[1:])
    assert all(shapes(r) == EVALUATION for r in evaluations)
    assert shapes(records[-1]) == AT_THE_END and records[-1]["step"] == 24
    assert len(records) == len(steps) + len(evaluations) + 1


def test_the_metrics_mean_what_they_say(undisturbed, config):
    steps = [r for r in read_metrics(undisturbed) if "loss" in r]
    tokens = config.data.batch_size * config.data.seq_len
    for r in steps:
        np.testing.assert_allclose(r["expert_load/1"].sum(), 1, rtol=1e-6)
        assert np.all((r["gate/1"] > 0) & (r["gate/1"] < 1))
        assert 0 < r["rows_touched/1"] <= tokens * config.model.engram.heads
        assert r["distinct/1"] * tokens * config.model.engram.heads == r["rows_touched/1"]
        assert r["extra_rounds/1"] == 0
        assert 0 < r["grad_norm_memory"] < r["grad_norm"]
    assert steps[0]["hit_rate/1"] == 0  # no row was ever trained before
    assert steps[-1]["hit_rate/1"] > steps[1]["hit_rate/1"] > 0
    assert abs(steps[0]["loss"] - math.log(config.tokenizer.vocab_size)) < 0.2
    assert steps[-1]["loss"] < steps[0]["loss"]
    peak = config.optimizer.peak_lr
    # Two steps of warm-up, then down at 80 % and 90 % of 24 steps.
    expected = [peak / 2, *[peak] * 18, *[0.316 * peak] * 3, *[0.1 * peak] * 2]
    np.testing.assert_allclose([r["learning_rate"] for r in steps], expected, rtol=1e-6)


def test_every_loss_has_one_meaning(undisturbed, config, data):
    """validation_loss is of the first batches and held_out_loss of all, for the model and for the
    count models, in losses.json, the metrics and TensorBoard."""
    losses = json.loads((undisturbed / "losses.json").read_text())
    assert losses["step"] == 24
    records = read_metrics(undisturbed)
    shown = {tag: value for step, tag, value in events(undisturbed) if step == 24}
    vocabulary, trained = config.tokenizer.vocab_size, list(islice(data.train_iterator(), 24))
    for name, limit in (("validation", config.train.eval_batches), ("held_out", None)):
        scored = list(data.validation_batches(limit=limit))
        found = losses[f"{name}_loss"]
        targets = sum(int(batch["loss_mask"].sum()) for batch in scored)
        assert (found["batches"], found["targets"]) == (len(scored), targets)
        mine = found["nats_per_token"]["engram_tiny"]
        (record,) = (r for r in records if r["step"] == 24 and f"{name}_loss" in r)
        assert (record[f"{name}_loss"], record[f"{name}_targets"]) == (mine, targets)
        assert shown[f"{name}_loss"] == pytest.approx(mine, rel=1e-6)
        for count_model, nats in fit_and_score(trained, scored, vocabulary).items():
            title = {"kneser_ney_3gram": "Kneser-Ney 3-gram"}.get(count_model, count_model)
            expected = pytest.approx(nats.mean(), rel=1e-12)
            assert found["nats_per_token"][f"{title} counts"] == expected
    assert losses["validation_loss"]["of"] == "the first 2 batches of the held-out split"
    assert losses["held_out_loss"]["batches"] > 2
    held_out = data.prepared.store_valid
    size = len(data.prepared.tokenizer.decode(held_out.tokens.tolist()).encode())
    for title, loss in losses["held_out_loss"]["nats_per_token"].items():
        bits = loss / math.log(2) * len(held_out) / size
        assert losses["held_out_loss"]["bits_per_byte"][title] == pytest.approx(bits, rel=1e-3)
    assert losses["data"] == data.prepared.summary()


def test_the_report_says_what_was_trained_on_what(undisturbed, config, data):
    losses = json.loads((undisturbed / "losses.json").read_text())
    (launch,) = run_record.read_launches(undisturbed / "run.json")
    held_out, validation = losses["held_out_loss"], losses["validation_loss"]
    nats = held_out["nats_per_token"]
    wanted = [
        f"| engram_tiny | {nats['engram_tiny']:.4f} |",
        f"{held_out['bits_per_byte']['engram_tiny']:.4f}",
        f"| bigram counts | {nats['bigram counts']:.4f} |",
        f"whole held-out split, {held_out['batches']} batches, {held_out['targets']:,} predicted",
        f"{validation['nats_per_token']['engram_tiny']:.4f} after step 24; the first 2 batches of",
        "| steps | 24 |",
        f"| parameters | {describe.describe(config)['total_params']:,} |",
        f"| source | {config.data.path} |",
        f"| digest of the text | {data.prepared.report.digest} |",
        f"{len(data.prepared.store_train):,} tokens",
        f"| command | {launch['command']} |",
        f"| commit | {launch['git']['commit'] if launch['git'] else 'unknown'}",
        "| optimizer.peak_lr | 0.01 | 0.0004 |",
        "| optimizer.clip_norm | 1.0 |  |",
    ]
    text = (undisturbed / "report.md").read_text()
    assert not [line for line in wanted if line not in text]
    pictures = {path.stem for path in (undisturbed / "report").iterdir()}
    assert pictures == {"loss", "optimisation", "memory", "gates", "experts"}
    html = (undisturbed / "report.html").read_text()
    assert html.count('src="data:image/png;base64,') == len(pictures)


def test_a_run_leaves_curves_and_its_record(undisturbed, config):
    boards = list((undisturbed / "tensorboard").iterdir())
    assert any(board.stat().st_size > 1000 for board in boards)
    (launch,) = run_record.read_launches(undisturbed / "run.json")
    assert launch["config"] == json.loads(json.dumps(to_dict(config)))
    assert launch["versions"]["jax"] == jax.__version__
    assert {"python", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(launch["versions"])
    assert re.fullmatch("[0-9a-f]{40}", launch["git"]["commit"]) if launch["git"] else True
    assert launch["command"] and launch["resumed_at"] == 0
    text = launch["data"]
    assert text["source"] == config.data.path and re.fullmatch("[0-9a-f]{32}", text["digest"])
    assert text["train_documents"] + text["validation_documents"] == 60
    assert text["python"] == launch["versions"]["python"]


def test_checkpoints_are_the_latest_and_the_best(undisturbed):
    with Checkpointer(undisturbed, read_only=True) as checkpointer:
        best = best_step(undisturbed)
        assert checkpointer.steps() == sorted({best, 18, 21, 24})
        assert checkpointer.best_step() == best


def test_nothing_is_transferred_implicitly(config, data, tmp_path):
    """Steps, evaluation, metrics and checkpoints: every transfer in the loop is asked for."""
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        jnp.add(np.ones(3), 1)  # what the guard catches
    program = build_training(config, data.addressing)
    with Checkpointer(tmp_path, addressing=data.addressing) as checkpointer:
        launch = loop.Launch(config, tmp_path, lambda line: None)
        run = loop.Run(launch, data, program, checkpointer)
        with jax.transfer_guard("disallow"):
            state = run.loop()
        assert checkpointer.steps()[-3:] == [18, 21, 24]
    assert int(state.step) == 24


def test_a_step_is_dispatched_before_the_last_ones_metrics_are_read(
    config, data, tmp_path, monkeypatch
):
    """So the device always has work. Only a checkpoint (every third step) waits for its own."""
    events: list[tuple[str, int]] = []
    dispatched: list[dict] = []
    jit_train_step, device_get = loop.jit_train_step, jax.device_get

    def recording_steps(program):
        step = jit_train_step(program)

        def dispatch(state, batch):
            events.append(("dispatch", len(dispatched)))
            state, metrics = step(state, batch)
            dispatched.append(metrics)
            return state, metrics

        return dispatch

    def recording_get(tree):
        events.extend(("read", n) for n, metrics in enumerate(dispatched) if metrics is tree)
        return device_get(tree)

    monkeypatch.setattr(loop, "jit_train_step", recording_steps)
    monkeypatch.setattr(jax, "device_get", recording_get)
    program = build_training(config, data.addressing)
    with Checkpointer(tmp_path, addressing=data.addressing) as checkpointer:
        launch = loop.Launch(config, tmp_path, lambda line: None)
        loop.Run(launch, data, program, checkpointer).loop()
    three = [("dispatch", 0), ("dispatch", 1), ("read", 0), ("dispatch", 2), ("read", 1)]
    three.append(("read", 2))
    assert events == [(what, n + 3 * k) for k in range(8) for what, n in three]


def numbers(batches: Iterator[dict], data: RunData) -> set[int]:
    """Which documents of the corpus ("document 17 ...") the tokens of the batches are from."""
    text = " ".join(
        data.prepared.tokenizer.decode(row.tolist(), skip_special_tokens=False)
        for batch in batches
        for row in batch["tokens"]
    )
    return {int(number) for number in re.findall(r"document (\d+)\n", text)}


def test_no_held_out_document_is_trained_on(corpus):
    data = open_data(small_config(corpus, data__seq_len=64), log=lambda line: None)
    iterator = data.train_iterator()
    trained = numbers((next(iterator) for _ in range(200)), data)
    held_out = numbers(data.validation_batches(), data)
    assert len(held_out) > 5 and len(trained) > 30
    assert not trained & held_out
    assert trained | held_out <= set(range(60))


def evaluated(corpus: Path, workdir: Path, *arguments: str) -> dict:
    outcome = launched(*small_run(corpus, workdir), "--mode=evaluate", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    assert re.findall(r"^\[ *\d+\.\d s\] (\w+)", outcome.err, re.M)[:2] == ["reading", "scoring"]
    return json.loads(outcome.out)


def test_evaluate_prints_one_object(corpus, undisturbed, data):
    result = evaluated(corpus, undisturbed)
    names = {"held_out_loss", "held_out_batches", "held_out_targets", "perplexity", "bits_per_byte"}
    assert set(result) == {"name", "step", "documents", "by_context_ngram", *names}
    assert (result["name"], result["step"]) == ("engram_tiny", 24)
    loss = result["held_out_loss"]
    trained = json.loads((undisturbed / "losses.json").read_text())["held_out_loss"]
    assert loss == trained["nats_per_token"]["engram_tiny"]
    assert result["held_out_batches"] == trained["batches"]
    assert result["held_out_targets"] == trained["targets"]
    assert result["perplexity"] == pytest.approx(math.exp(loss))
    held_out = data.prepared.store_valid
    text = data.prepared.tokenizer.decode(held_out.tokens.tolist())
    bits = loss / math.log(2) * len(held_out) / len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-3)


def test_evaluate_any_checkpoint(corpus, undisturbed):
    assert evaluated(corpus, undisturbed, "--step=best")["step"] == best_step(undisturbed)
    assert evaluated(corpus, undisturbed, "--step=18")["step"] == 18
    outcome = launched(*small_run(corpus, undisturbed), "--mode=evaluate", "--step=7")
    assert outcome.code == 2
    assert "step 7 was asked for; there are steps" in outcome.err
    assert "18, 21, 24" in outcome.err


def test_evaluate_as_text(corpus, undisturbed):
    outcome = launched(*small_run(corpus, undisturbed), "--mode=evaluate", "--step=21")
    assert outcome.code == 0
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["step"] == "21" and float(lines["held_out_loss"]) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generate_prints_the_prompt_and_what_the_generator_says(
    corpus, undisturbed, config, temperature
):
    arguments = small_run(corpus, undisturbed, generate__temperature=temperature)
    arguments.append("--config.generate.max_tokens=20")
    arguments.append("--config.serve.accept_longer=True")  # trained on 16
    outcome = launched(*arguments, "--mode=generate", "--prompt=document 3\nabcd", "--step=best")
    assert outcome.code == 0, outcome.err
    settings = small_config(
        corpus, generate__temperature=temperature, generate__max_tokens=20
    ).generate
    trained = load_model(config, undisturbed, "best")
    generator = Generator(trained.program, trained.weights)
    ids = trained.tokenizer.encode("document 3\nabcd", add_special_tokens=False).ids
    (found,) = generator.complete([ids], settings, trained.eos_id)
    text = trained.tokenizer.decode(found)
    assert outcome.out == f"document 3\nabcd{text}\n"
    assert len(text) > 3


def test_generating_needs_a_token_to_start_from(corpus, undisturbed):
    outcome = launched(*small_run(corpus, undisturbed), "--mode=generate", "--prompt=")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == "error: prompt: must have at least one token"
    assert outcome.out == ""


def test_two_launches_do_not_train_in_one_workdir(corpus, undisturbed):
    before = (undisturbed / "run.json").read_text()
    with locked(undisturbed):
        outcome = launched(*small_run(corpus, undisturbed))
    assert outcome.code == 2
    assert f"--workdir={undisturbed}: another process is training there" in outcome.err
    assert (undisturbed / "run.json").read_text() == before
