"""Scores a trained model on the synthetic tasks of its training text, with its memory on and off.

By likelihood: the answer has a higher sum of log probabilities of its tokens than every distractor.
By generation: greedy decoding after the prompt begins with the answer's tokens. Both come from one
forward pass over prompt + candidate: greedy decoding gives the answer if and only if each of its
tokens is the likeliest one after those before it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import drawable_ids
from engram_jax.checkpoint.load_model import load_model
from engram_jax.checkpoint.workdir import TASK_ITEMS, TASK_SCORES, file_of_step
from engram_jax.config import OVER_ENCODING, Config
from engram_jax.config.errors import UserError
from engram_jax.data.mixed_tasks import TaskItems, read_items
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree
from engram_jax.hardware.storage import write_text
from engram_jax.memory.table import lookup
from engram_jax.model.program import Program, Weights
from engram_jax.model.sampling import drawable_logits
from engram_jax.sharding.rules import P
from engram_jax.tasks.drawing import Item
from engram_jax.training.step import batch_addresses

_LEAST = 32  # tokens that a short item is padded to
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class ItemScore:
    """log_likelihoods: float64 [candidates], the answer's first, nats. greedy: whether greedy
    decoding gives the answer."""

    log_likelihoods: np.ndarray
    greedy: bool

    @property
    def correct(self) -> bool:
        """Whether the answer is likelier than every distractor."""
        return bool((self.log_likelihoods[0] > self.log_likelihoods[1:]).all())


def evaluate_tasks(
    config: Config, workdir: Path, step: str, accept: Sequence[str] = ()
) -> dict[str, Any]:
    """Score a checkpoint ("latest", "best" or a step) on the items that its run kept; the result is
    written to `workdir`/task_scores.json, too, or of another checkpoint than the newest to
    task_scores_STEP.json.

    What is switched off for the second scoring is config.serve.off_layers, or by default every
    layer's memory, Engram's and product keys. accept: keys or sections of `config` that may differ
    from the run's.

    Raises UserError for a run without tasks, a checkpoint that does not fit, or as `check_off`.
    """
    check_off(config)
    found = agree(lambda: read_items(workdir / TASK_ITEMS))
    tell = processes.stages(sys.stderr)  # standard output is the result
    tell("reading the checkpoint")
    trained = load_model(config, workdir, step, accept=accept)
    tell(f"scoring {len(found.items):,} items, with the memory on and off")
    return score_tasks(
        trained.program, trained.weights, trained.tokenizer, found, trained.step, workdir
    )


def check_off(config: Config) -> None:
    """Raises UserError for orders to switch off: the scores are of whole layers on and off; and for
    the moving average: the scores in the run's folder are the parameters' own."""
    if config.serve.ema:
        raise UserError("config.serve.ema = True: not for scoring tasks; leave it out")
    if orders := config.serve.off_orders:
        raise UserError(
            f"config.serve.off_orders={orders}: not for scoring tasks, which switches whole layers"
            " off (config.serve.off_layers); leave it out"
        )


def score_tasks(
    program: Program,
    weights: Weights,
    tokenizer: Any,
    found: TaskItems,
    step: int,
    workdir: Path,
) -> dict[str, Any]:
    """Score the model after `step` steps, with its memory on and off; process 0 also writes the
    result to `workdir` (`file_of_step`). Items longer than the trained sequences are left out."""
    config = program.config
    learned = map(str, config.model.product_keys.layers)
    layers = tuple(sorted({*program.table_rows, *learned}, key=int))
    off = tuple(filter(config.serve.is_off, layers)) or layers
    items, encoded = [], []
    for item in found.items:
        candidates = encode(tokenizer, item)
        if max(len(ids) for ids, _ in candidates) <= config.data.seq_len:
            items.append(item)
            encoded.append(candidates)
    drawable = drawable_ids(tokenizer, config.tokenizer.vocab_size)
    on_scores = score(program, weights, encoded, drawable=drawable)
    off_scores = score(program, weights, encoded, off, drawable=drawable) if off else None
    tokens = step * config.data.batch_size * config.data.seq_len
    result = {
        "name": config.name,
        "step": step,
        "epochs": tokens / found.train_tokens,
        "off_layers": [int(layer) for layer in off],
        "too_long": len(found.items) - len(items),
        "groups": summarise(items, on_scores, off_scores),
    }
    if jax.process_index() == 0:
        write_text(file_of_step(workdir, TASK_SCORES, step), json.dumps(result, indent=1) + "\n")
    return result


def encode(tokenizer: Any, item: Item) -> list[tuple[list[int], int]]:
    """(ids of prompt + candidate, how many of them are the prompt's) of every candidate, the answer
    first. Raises UserError for a tokenizer that spells nothing of an answer."""
    prompt = tokenizer.encode(item.prompt, add_special_tokens=False).ids
    out = []
    for candidate in (item.answer, *item.distractors):
        ids = tokenizer.encode(item.prompt + candidate, add_special_tokens=False).ids
        pairs = zip(prompt, ids, strict=False)
        # The last token of the prompt may become another one when text follows.
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(ids)))
        if not 0 < shared < len(ids):
            raise UserError(f"tasks: the tokenizer has no token for {candidate!r}")
        out.append((ids, shared))
    return out


def jit_scores(
    program: Program, off: Sequence[str] = (), drawable: np.ndarray | None = None
) -> jax.stages.Wrapped:
    """(weights, batch, masks) -> (sums of log probabilities [B], bool [B]), compiled; arguments as
    of `score`. masks: layer id -> bool [B, T, H], rows that are read as zero."""
    return program.jit(
        partial(_score_batch, program, off=tuple(off), drawable=drawable),
        out_shardings=NamedSharding(program.mesh, P()),
    )


def score(
    program: Program,
    weights: Weights,
    encoded: Sequence[Sequence[tuple[list[int], int]]],
    off: Sequence[str] = (),
    *,
    drawable: np.ndarray | None = None,
    compiled: Any = None,
    masks: Callable[[Batch], dict[str, Any]] = lambda batch: {},
) -> list[ItemScore]:
    """Score items, each a list of candidates of `encode`. off: layers whose memory adds nothing.
    drawable: bool [V], the ids that decoding may draw (`addressing.drawable_ids`), None = all.
    compiled: `jit_scores` of these, where several calls share it. masks: which rows of a batch
    (tokens, segments) are read as zero, too.

    In form "over_encoding" the input is the mean of a token's embedding and one embedding per
    order. There the rows, with the classes of case, are taken as zero. That leaves
    embedding / (1 + orders), the share that the network was trained with; without the module it
    would be 1 + orders times as large.
    """
    rows = [candidate for item in encoded for candidate in item]
    if not rows:
        return []
    run = jit_scores(program, off, drawable) if compiled is None else compiled
    size = program.config.data.batch_size
    answers = max(len(ids) - shared for ids, shared in rows)
    lengths = np.array([_padded(len(ids)) for ids, _ in rows])
    flat, all_greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for length in np.unique(lengths):  # few: each is a compiled program
        alike = np.flatnonzero(lengths == length)
        for start in range(0, len(alike), size):
            these = alike[start : start + size]
            batch = _batch([rows[i] for i in these], size, int(length), answers)
            sums, greedy = jax.device_get(run(weights, batch, masks(batch)))
            flat[these], all_greedy[these] = sums[: len(these)], greedy[: len(these)]
    scores, at = [], 0
    for item in encoded:
        scores.append(ItemScore(flat[at : at + len(item)], bool(all_greedy[at])))
        at += len(item)
    return scores


def _padded(length: int) -> int:
    """The least power of two of tokens, of _LEAST and more, that holds so many."""
    return max(_LEAST, 1 << (length - 1).bit_length())


def _batch(rows: Sequence[tuple[list[int], int]], size: int, length: int, answers: int) -> Batch:
    """tokens, segments int32 [size, length] (segment 0 is padding); places, targets int32
    [size, answers]: from where each token of an answer is predicted; counts bool [size, answers].
    """
    tokens, segments = np.zeros((2, size, length), np.int32)
    places, targets = np.zeros((2, size, answers), np.int32)
    counts = np.zeros((size, answers), bool)
    for row, (ids, shared) in enumerate(rows):
        n = len(ids) - shared
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        places[row, :n] = np.arange(shared - 1, len(ids) - 1)
        targets[row, :n], counts[row, :n] = ids[shared:], True
    return {
        "tokens": tokens,
        "segments": segments,
        "places": places,
        "targets": targets,
        "counts": counts,
    }


def _score_batch(
    program: Program,
    weights: Weights,
    batch: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    off: tuple[str, ...],
    drawable: np.ndarray | None,
) -> tuple[jax.Array, jax.Array]:
    """(sums of log probabilities [B], whether every token was the likeliest bool [B])."""
    tokens, segments = batch["tokens"], batch["segments"]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    addresses = batch_addresses(program, {"tokens": tokens, "segments": segments})
    dtype = program.config.model.dtype
    rows = {
        layer: lookup(weights.rows[layer], ids).astype(dtype) for layer, ids in addresses.items()
    }
    for layer, mask in masks.items():
        rows[layer] = jnp.where(mask[..., None], 0, rows[layer])
    model = program.model(weights.params, weights.router_bias)
    for layer in off:  # a model made for this call alone: without the module, nothing is added
        model.product_keys.pop(layer, None)
        if program.config.model.engram.form == OVER_ENCODING:
            if layer in rows:
                rows[layer] = jnp.zeros_like(rows[layer])
            model.engram_case.pop(layer, None)  # it is added to the rows
        elif layer in model.engrams:
            del model.engrams[layer], rows[layer]
    mask, beside = program.memory_mask(tokens), program.beside(tokens, segments)
    output = model(tokens, rows, positions, segments, mask, beside=beside)
    hidden = jnp.take_along_axis(output.hidden, batch["places"][..., None], axis=1)
    logits = model.logits(hidden)
    chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    log_probabilities = chosen - jax.nn.logsumexp(logits, axis=-1)
    likeliest = jnp.argmax(drawable_logits(logits, drawable), axis=-1) == batch["targets"]
    counts = batch["counts"]
    sums = jnp.sum(jnp.where(counts, log_probabilities, 0), axis=1)
    return sums, jnp.all(likeliest | ~counts, axis=1)


def summarise(
    items: Sequence[Item], on: Sequence[ItemScore], off: Sequence[ItemScore] | None
) -> list[dict[str, Any]]:
    """One record per task, difficulty and frequency, in the items' order: their number, chance, and
    accuracies with standard errors, sqrt(p (1 - p) / n).

    retained: (off - chance) / (on - chance) of the accuracies by likelihood, null unless `on` is
    more than 3 standard errors above chance, the larger of the error at `on` and that at chance.
    """
    groups: dict[tuple[str, str, int], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((item.task, item.difficulty, item.frequency), []).append(i)
    records = []
    for (task, difficulty, frequency), members in groups.items():
        n = len(members)
        chance = math.fsum(items[i].chance for i in members) / n
        record: dict[str, Any] = {"task": task, "difficulty": difficulty}
        record |= {"frequency": frequency, "items": n, "chance": chance}
        for name, scores in (("on", on), ("off", off)):
            if scores is not None:
                record[name] = _accuracy([scores[i].correct for i in members])
                record[f"{name}_greedy"] = _accuracy([scores[i].greedy for i in members])
        if off is not None:
            p = record["on"]["accuracy"]
            error = max(record["on"]["standard_error"], math.sqrt(chance * (1 - chance) / n))
            above = p - chance > 3 * error
            gone = record["off"]["accuracy"] - chance
            record["retained"] = gone / (p - chance) if above else None
        records.append(record)
    return records


def _accuracy(correct: Sequence[bool]) -> dict[str, float]:
    p = float(np.mean(correct))
    return {"accuracy": p, "standard_error": math.sqrt(p * (1 - p) / len(correct))}
