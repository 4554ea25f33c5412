"""The results of a finished run: held-out loss and count models, samples, gates, the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.addressing import drawable_ids
from engram_jax.analysis.gates import gates_of_document
from engram_jax.checkpoint.workdir import HELD_OUT_DOCUMENTS, LOSSES
from engram_jax.config import SHUFFLED, Config
from engram_jax.config.difference import flat
from engram_jax.config.errors import UserError
from engram_jax.data.run_data import RunData
from engram_jax.evaluation.count_models import fit_and_score
from engram_jax.evaluation.held_out import BY_CONTEXT, Evaluator, Score
from engram_jax.evaluation.target_losses import (
    context_lines,
    losses_by_context,
    seen_contexts,
    shown,
    write_documents,
)
from engram_jax.evaluation.tasks import score_tasks
from engram_jax.hardware.storage import write_text
from engram_jax.model.decode import Generator
from engram_jax.model.describe import describe
from engram_jax.model.program import Program, Weights
from engram_jax.monitoring.metrics import MetricsWriter, json_value, read_metrics
from engram_jax.report.write import GateSample, write_report
from engram_jax.serve.text_stream import continuation
from engram_jax.tasks.score_table import table
from engram_jax.training.state import TrainState, weights_of
from engram_jax.training.step import touched_rows

GATE_TOKENS = 160

_TITLES = {
    "unigram": "unigram counts",
    "bigram": "bigram counts",
    "kneser_ney_3gram": "Kneser-Ney 3-gram counts",
}


def end_run(
    config: Config,
    workdir: Path,
    data: RunData,
    evaluator: Evaluator,
    state: TrainState,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate on the whole held-out split and on synthetic tasks, compare, sample, and write the
    report.

    Returns `loss_record`; process 0 also writes it to `workdir`/losses.json, and the held-out loss
    to the metrics.
    """
    of_model = evaluator.target_nats(state)
    held_out = evaluator.whole(of_model)
    validation = evaluator.score(state, config.train.eval_batches)
    weights = weights_of(evaluator.program, state)
    nats: dict[str, np.ndarray] = {}
    if config.train.count_models:
        log("fitting the count models to the same training tokens")
        nats = count_model_nats(config, data)
    losses = loss_record(config.name, int(state.step), data, held_out, validation, nats)
    contexts = seen_contexts(data, config.train.steps)
    losses["held_out_loss"][BY_CONTEXT] = losses_by_context(
        contexts, {config.name: of_model, **nats}
    )
    if memory := memory_use(evaluator.program, state):
        losses["memory"] = memory
    log(loss_table(losses))
    if not contexts.orders:
        log(f"n-grams of context: not looked for in {contexts.tokens:,} tokens (train.seen_tokens)")
    samples = continuations(config, data, evaluator, weights)
    for prompt, text in samples:
        log(f"--- {prompt!r} continues:\n{prompt}{text}")
    gates = gate_sample(data, evaluator, weights)
    if tasks := data.prepared.tasks:
        found = tasks.for_scoring
        tokenizer = data.prepared.tokenizer
        scores = score_tasks(evaluator.program, weights, tokenizer, found, int(state.step), workdir)
        log(f"synthetic tasks\n{table(scores)}\n")
    if jax.process_index() == 0:
        write_held_out(workdir, int(state.step), held_out, config)
        write_documents(
            workdir / HELD_OUT_DOCUMENTS,
            *(data.prepared.store_valid, of_model, contexts, int(state.step)),
        )
        text = json.dumps(json_value(losses), indent=1, allow_nan=False)
        write_text(workdir / LOSSES, text + "\n")
        model = describe(config)
        report = write_report(workdir, title=config.name, model=model, gates=gates, samples=samples)
        log(f"report: {report}")
    return losses


def count_model_nats(config: Config, data: RunData) -> dict[str, np.ndarray]:
    """Nats of every held-out target in order, float64 [n], by count model; fitted on exactly the
    batches the run trained on."""
    with closing(data.train_iterator()) as trained:
        batches = islice(trained, config.train.steps)
        nats = fit_and_score(batches, data.validation_batches(), config.tokenizer.vocab_size)
    return {_TITLES[name]: found for name, found in nats.items() if name in _TITLES}


def loss_record(
    name: str,
    step: int,
    data: RunData,
    held_out: Score,
    validation: Score,
    counts: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The contents of losses.json: for both losses of evaluation/held_out.py, which text they are
    over and their values for the model and, on the same targets, for every count model.

    counts: nats of every held-out target, in order, by count model.
    """

    def losses(score: Score, of: str) -> dict[str, Any]:
        found = {name: score.loss}
        for title, nats in counts.items():
            if len(nats) != held_out.targets:
                raise RuntimeError(f"{title}: {len(nats):,} targets, not {held_out.targets:,}")
            found[title] = float(nats[: score.targets].mean())
        size = {"of": of, "batches": score.batches, "targets": score.targets}
        return {**size, "nats_per_token": found}

    whole = losses(held_out, f"the whole held-out split, {held_out.batches:,} batches")
    per_byte = 1 / math.log(2) / data.prepared.bytes_per_token  # a ratio over the whole split
    bits = {name: loss * per_byte for name, loss in whole["nats_per_token"].items()}
    first = f"the first {validation.batches:,} batches of the held-out split"
    return {
        "step": step,
        "held_out_loss": {**whole, "bits_per_byte": bits},
        "validation_loss": losses(validation, first),
        "data": data.prepared.summary(),
    }


def memory_use(program: Program, state: TrainState) -> dict[str, dict[str, float | int | None]]:
    """How often the rows of each Engram layer's table were read in training, by layer id.

    Of a table of `rows`: training tokens per row, lookups per row, and per row that was ever
    trained (`touched_rows`; None if none was, as of frozen tables). A token looks up H rows of it.
    """
    config = program.config
    tokens = int(state.step) * config.data.batch_size * config.data.seq_len
    lookups = tokens * config.model.engram.heads
    used = jax.device_get(jax.jit(touched_rows)(state.memory))
    found: dict[str, dict[str, float | int | None]] = {}
    for layer, rows in program.table_rows.items():
        touched = int(used[layer]) if layer in used else None
        found[layer] = {
            "rows": rows,
            "tokens_per_row": tokens / rows,
            "lookups_per_row": lookups / rows,
            "touched_rows": touched,
            "lookups_per_touched_row": lookups / touched if touched else None,
        }
    return found


def loss_table(losses: Mapping[str, Any]) -> str:
    """The held-out losses of `loss_record` as text for a terminal."""
    held_out = losses["held_out_loss"]
    bits = held_out["bits_per_byte"]
    width = max(map(len, [*bits, "held-out loss"])) + 2
    lines = ["", f"{'held-out loss':{width}} nats per token  bits per byte"]
    for name, loss in held_out["nats_per_token"].items():
        lines.append(f"{name:{width}} {loss:<14.3f}  {bits[name]:.3f}")
    lines.append(f"over {held_out['of']}, {held_out['targets']:,} predicted tokens")
    name = next(iter(held_out["nats_per_token"]))  # the model's
    lines += context_lines(held_out.get(BY_CONTEXT, {}), name)
    for layer, used in losses.get("memory", {}).items():
        lines.append(
            f"memory at layer {layer}: {used['tokens_per_row']:,.1f} training tokens and"
            f" {used['lookups_per_row']:,.1f} lookups per row,"
            f" {shown(used['lookups_per_touched_row'], 1)} per touched row"
        )
    return "\n".join([*lines, ""])


def write_held_out(workdir: Path, step: int, score: Score, config: Config) -> None:
    """Add the held-out loss after `step` to the run's metrics, unless they have it already."""
    for record in read_metrics(workdir):
        if record["step"] == step and "held_out_loss" in record:
            return  # computed on other devices, its last digits may differ
    loggers, keys = config.train.loggers, flat(config)
    with MetricsWriter(workdir, start_step=step, loggers=loggers, config=keys) as writer:
        writer.write(step, {"held_out_loss": score.loss, "held_out_targets": score.targets})


def check_samples(config: Config, tokenizer: Any) -> None:
    """Raises UserError, before training, for a configured prompt without tokens, or one that its
    continuation makes longer than the trained sequences.

    A prompt may have no tokens because some tokenizers strip what they do not know.
    """
    lengths = {
        prompt: len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        for prompt in config.train.samples
    }
    for prompt, tokens in lengths.items():
        if not tokens:
            raise UserError(
                f"config.train.samples: {prompt!r} is no token of this tokenizer; every prompt must"
                " have at least one"
            )
    most, trained = config.train.sample_tokens, config.data.seq_len
    for prompt, tokens in lengths.items():
        if tokens + most > trained:
            raise UserError(
                f"config.train.sample_tokens = {most}: must be at most {trained - tokens}, what the"
                f" {tokens} tokens of {prompt!r} leave of data.seq_len = {trained}"
            )


def continuations(
    config: Config, data: RunData, evaluator: Evaluator, weights: Weights
) -> list[tuple[str, str]]:
    """(prompt, continuation) of every configured sample."""
    prompts = config.train.samples
    if not prompts:
        return []
    tokenizer = data.prepared.tokenizer
    drawable = drawable_ids(tokenizer, config.tokenizer.vocab_size)
    generator = Generator(evaluator.program, weights, drawable)
    ids = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    found = generator.complete(
        ids, config.generate, data.prepared.eos_id, max_tokens=config.train.sample_tokens
    )
    texts = [continuation(tokenizer, p, f) for p, f in zip(ids, found, strict=True)]
    return list(zip(prompts, texts, strict=True))


def gate_sample(data: RunData, evaluator: Evaluator, weights: Weights) -> GateSample | None:
    """The gates on the beginning of a held-out document; None for a model without memory or gates,
    or one that reads another sequence's rows.

    It is the first document of at least GATE_TOKENS tokens, else the longest, read from its start:
    n-grams and attention see the same context as in training.
    """
    engram = data.config.model.engram
    if data.addressing is None or not engram.gated or engram.lookup == SHUFFLED:
        return None
    store, tokenizer = data.prepared.store_valid, data.prepared.tokenizer
    lengths = np.minimum(np.diff(store.starts) - 1, GATE_TOKENS)  # without the end of the document
    document = int(np.argmax(lengths))  # the first of the longest
    start = int(store.starts[document])
    ids = store.tokens[start : start + int(lengths[document])].tolist()
    strings, gates = gates_of_document(evaluator.program, weights, tokenizer, ids)
    return GateSample(strings, gates, list(data.addressing.layers)) if len(gates) else None
