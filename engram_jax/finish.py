"""What a finished run shows: held-out loss beside count models, samples, gates, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.analysis.count_models import fit_and_score
from engram_jax.analysis.gates import gates_of_document
from engram_jax.config import Config
from engram_jax.errors import UserError
from engram_jax.evaluate import Evaluator
from engram_jax.generate import Generator, Weights
from engram_jax.report import GateSample, write_report
from engram_jax.restore import weights_of
from engram_jax.run_data import RunData
from engram_jax.serve.text import continuation
from engram_jax.train_state import TrainState

GATE_TOKENS = 160

_TITLES = {
    "unigram": "unigram counts",
    "bigram": "bigram counts",
    "kneser_ney_3gram": "Kneser-Ney 3-gram counts",
}


def finish(
    config: Config,
    workdir: Path,
    data: RunData,
    evaluator: Evaluator,
    state: TrainState,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Evaluate on the whole held-out split, compare, sample, and write the report.

    Returns the losses by model name, nats per token on the same held-out targets; process 0 also
    writes them to `workdir`/losses.json.
    """
    losses = {config.name: evaluator.loss(state)}
    weights = weights_of(evaluator.program, state)
    if config.train.count_models:
        log("fitting the count models to the same training tokens")
        losses |= count_model_losses(config, data)
    log(loss_table(losses))
    samples = continuations(config, data, evaluator, weights)
    for prompt, text in samples:
        log(f"--- {prompt!r} continues:\n{prompt}{text}")
    gates = gate_sample(data, evaluator, weights)
    if jax.process_index() == 0:
        (workdir / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
        report = write_report(
            workdir,
            title=config.name,
            figures={"held-out loss": losses[config.name]},
            baselines={k: v for k, v in losses.items() if k != config.name},
            gates=gates,
            samples=samples,
        )
        log(f"report: {report}")
    return losses


def count_model_losses(config: Config, data: RunData) -> dict[str, float]:
    """Count models fitted on the very batches the run trained on, scored on the same targets."""
    batches = islice(data.train_iterator(), config.train.steps)
    scores = fit_and_score(batches, data.validation_batches(), config.tokenizer.vocab_size)
    return {_TITLES[name]: loss for name, loss in scores.items() if name in _TITLES}


def loss_table(losses: dict[str, float]) -> str:
    width = max(len(name) for name in losses) + 2
    lines = ["", f"{'held-out loss':{width}} nats per token"]
    lines += [f"{name:{width}} {loss:.3f}" for name, loss in losses.items()]
    return "\n".join([*lines, ""])


def check_samples(config: Config, tokenizer: Any) -> None:
    """Raises UserError for a configured prompt that is no token, or that becomes longer than what
    is trained on: known before training, not after.

    Some tokenizers strip what they normalise or do not know.
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
    generator = Generator(evaluator.program, weights)
    tokenizer = data.prepared.tokenizer
    ids = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    found = generator.complete(
        ids, config.generate, data.prepared.eos_id, max_tokens=config.train.sample_tokens
    )
    texts = [continuation(tokenizer, p, f) for p, f in zip(ids, found, strict=True)]
    return list(zip(prompts, texts, strict=True))


def gate_sample(data: RunData, evaluator: Evaluator, weights: Weights) -> GateSample | None:
    """The gates on the beginning of a held-out document; None for a model without memory.

    Of the first one that is long enough, else of the longest: n-grams and attention reach back to
    the document's start and no further, as in training.
    """
    if data.addressing is None:
        return None
    store, tokenizer = data.prepared.store_valid, data.prepared.tokenizer
    lengths = np.minimum(np.diff(store.starts) - 1, GATE_TOKENS)  # without the end of the document
    document = int(np.argmax(lengths))  # the first of the longest
    start = int(store.starts[document])
    ids = store.tokens[start : start + int(lengths[document])].tolist()
    strings, gates = gates_of_document(evaluator.program, weights, tokenizer, ids)
    return GateSample(strings, gates, list(data.addressing.layers))
