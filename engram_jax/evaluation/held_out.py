"""The two losses on held-out text, and the evaluation of a checkpoint.

validation_loss   over the first train.eval_batches batches of the held-out split: while training
held_out_loss     over the whole split: at the end of training, and by --mode=evaluate

Both in nats per target, a target being a token that is predicted (`loss_mask`). The second is the
mean of the losses of all targets, each of which is kept (evaluation/target_losses.py).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import as_stored, load_tokenizer, tokenizer_fingerprint
from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.load_model import text_of
from engram_jax.checkpoint.manager import Checkpointer, Restored
from engram_jax.checkpoint.run_settings import DATA, Changes, check_opened, check_text, covers
from engram_jax.checkpoint.workdir import (
    HELD_OUT_DOCUMENTS,
    TOKENIZER,
    file_of_step,
    parse_step,
)
from engram_jax.config import Config, ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.data.packing import Batch
from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import RunData, open_on_all_processes
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree
from engram_jax.evaluation.target_losses import (
    context_lines,
    held_out_sequences,
    losses_by_context,
    seen_contexts,
    target_positions,
    write_documents,
)
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P
from engram_jax.training.state import (
    TrainingProgram,
    TrainState,
    abstract_state,
    build_training,
)
from engram_jax.training.step import eval_step, score_step

BY_CONTEXT = "by_context_ngram"


@dataclass(frozen=True)
class Score:
    """loss: nats per target, the mean over all `targets` of `batches` held-out batches."""

    loss: float
    batches: int
    targets: int

    def __str__(self) -> str:
        return f"{self.loss:.4f} ({self.batches:,} batches, {self.targets:,} predicted tokens)"


class Scored(Protocol):
    """What of a `TrainState` decides a loss."""

    @property
    def params(self) -> Any: ...
    @property
    def router_bias(self) -> Any: ...
    @property
    def memory(self) -> Any: ...


class Evaluator:
    """Losses over held-out batches; each step is compiled once.

    off: says which layers and orders are switched off in `target_nats`; None = none.
    """

    def __init__(self, program: Program, data: RunData, off: ServeConfig | None = None):
        self.program, self.data, self.off = program, data, off
        self._step = program.jit(
            partial(eval_step, program), out_shardings=NamedSharding(program.mesh, P())
        )

    @cached_property
    def _nats_step(self) -> jax.stages.Wrapped:
        def nats(params: Any, bias: Any, memory: Any, batch: Any) -> jax.Array:
            return score_step(self.program, params, bias, memory, batch, self.off)[0]

        return self.program.jit(nats, out_shardings=NamedSharding(self.program.mesh, P()))

    def over(self, data: RunData) -> Evaluator:
        """This evaluator, with its compiled steps, over other data of the same configuration."""
        other = copy.copy(self)
        other._nats_step, other.data = self._nats_step, data
        return other

    def target_nats(self, state: Scored, batches: int | None = None) -> np.ndarray:
        """The loss of every target of the first `batches` held-out batches (None: all) in order,
        float64 [n]; the same on all processes.

        Raises UserError as `check_held_out`.
        """
        check_held_out(self.data, batches)
        read = self.data.validation_batches(self.program.mesh, batches)
        found = [nats.reshape(-1) for nats in self.nats(state, read)]
        flat = np.concatenate(found).astype(np.float64)
        # Sequence i predicts token i T + t + 1 at position t.
        places = target_positions(self.data.prepared.store_valid) - 1
        return flat[places[places < len(flat)]]

    def nats(self, state: Scored, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """The losses of every batch's targets, [B, T], 0 where there is none. batches: this
        process's rows of each."""
        mesh, size = self.program.mesh, self.program.config.data.batch_size

        def dispatched() -> Iterator[jax.Array]:
            for batch in batches:
                placed = place_batch(mesh, batch, size)
                yield self._nats_step(state.params, state.router_bias, state.memory, placed)

        return fetched(dispatched())

    def whole(self, nats: np.ndarray) -> Score:
        """The loss over the whole held-out split, from that of its targets."""
        batches = -(-len(held_out_sequences(self.data)) // self.program.config.data.batch_size)
        return Score(float(nats.mean()), batches, len(nats))

    def score(self, state: TrainState, batches: int | None = None) -> Score:
        """The loss over the first `batches` held-out batches (None: all of them).

        Each batch's sum is read only after the next is dispatched. Raises UserError as
        `check_held_out`.
        """
        check_held_out(self.data, batches)
        pending: tuple[jax.Array, jax.Array] | None = None
        total, count = np.zeros(2), 0
        mesh, size = self.program.mesh, self.program.config.data.batch_size
        for host_batch in self.data.validation_batches(mesh, batches):
            batch = place_batch(mesh, host_batch, size)
            sums = self._step(state.params, state.router_bias, state.memory, batch)
            if pending is not None:
                total += jax.device_get(pending)
            pending, count = sums, count + 1
        if pending is not None:
            total += jax.device_get(pending)
        return Score(float(total[0] / total[1]), count, round(total[1]))


def fetched(dispatched: Iterable[Any]) -> Iterator[Any]:
    """The results on the host, each read only after the next is dispatched."""
    pending = None
    for result in dispatched:
        if pending is not None:
            yield jax.device_get(pending)
        pending = result
    if pending is not None:
        yield jax.device_get(pending)


def check_held_out(data: RunData, batches: int | None = None) -> None:
    """Raises UserError if the first `batches` held-out batches (None: all) have no target: their
    mean loss is not defined, and 0 would look like the best one."""
    config, sequences = data.config, held_out_sequences(data)
    store = sequences.store
    count = None if batches is None else batches * config.data.batch_size
    if not sequences.targets(count):
        first = "" if batches is None else f"first {batches} batches of the "
        raise UserError(
            f"the {first}held-out text ({store.documents:,} documents, {len(store):,} tokens) has"
            " no token to predict, the first of a document being none; give more text, or set"
            " config.data.validation_fraction or config.train.eval_batches higher"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A run's checkpoint with its data.

    changes: accepted differences to the settings it was trained with. same_text: whether the data
    is the run's.
    """

    workdir: Path
    data: RunData
    program: Program
    state: TrainState
    step: int
    changes: Changes
    same_text: bool


def open_checkpoint(
    config: Config, workdir: Path, step: str, accept: Sequence[str] = ()
) -> Checkpoint:
    """A checkpoint ("latest", "best" or a step) and the data to score it on; with config.serve.ema
    its parameters are their moving average.

    accept: keys or sections of `config` that may differ from what the run was trained with.

    Raises UserError if there is no such checkpoint, or if it is of other settings, another model,
    tokenizer or text.
    """
    changes = agree(lambda: check_opened(config, workdir, step, accept))
    data = open_on_all_processes(
        config, log=lambda line: print(line, file=sys.stderr), count_fgrams=False
    )
    agree(lambda: check_scored_tokenizer(workdir, data))
    mine = data.addressing
    addressing = None if mine is None else agree(lambda: as_stored(mine, workdir))
    data = dataclasses.replace(data, addressing=addressing)  # host addresses are the run's, too
    program = build_training(config, addressing)
    restored = restore_state(program, workdir, step)
    trained_on, fingerprint = text_of(restored), data.prepared.fingerprint
    same_text = agree(lambda: check_text(workdir, trained_on, fingerprint, accept))
    return Checkpoint(workdir, data, program, restored.state, restored.step, changes, same_text)


def restore_state(program: TrainingProgram, workdir: Path, step: str) -> Restored:
    """A checkpoint's whole state; with config.serve.ema its parameters are their moving average.

    Raises UserError if there is no such checkpoint, or if it is of another model or damaged.
    """
    addressing = program.addressing
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        found = table_order.restore(
            program, checkpointer, parse_step(step), abstract_state(program)
        )
    if not program.config.serve.ema:
        return found
    return dataclasses.replace(found, state=program.averaged(found.state))


def evaluate(
    config: Config, workdir: Path, step: str, accept: Sequence[str] = ()
) -> dict[str, Any]:
    """Held-out loss of a checkpoint over the whole held-out split; arguments and errors as of
    `open_checkpoint`.

    With "data" in `accept` it is scored on another text. The result lists the differences. Without
    any, and without config.serve.ema and off_layers or off_orders, process 0 writes the documents'
    losses to `workdir` (see `file_of_step`), and the result says by what n-grams of context, too.
    """
    tell = processes.stages(sys.stderr)  # standard output is the result
    tell("reading the checkpoint and the held-out text")
    found = open_checkpoint(config, workdir, step, accept)
    tell(f"scoring {len(held_out_sequences(found.data)):,} sequences")
    evaluator = Evaluator(found.program, found.data, config.serve)
    nats = evaluator.target_nats(found.state)
    score = evaluator.whole(nats)
    result = {
        "name": config.name,
        "step": found.step,
        "held_out_loss": score.loss,
        "held_out_batches": score.batches,
        "held_out_targets": score.targets,
        "perplexity": perplexity(score.loss),
        "bits_per_byte": score.loss / math.log(2) / found.data.prepared.bytes_per_token,
    }
    if config.serve.ema:
        result["ema_decay"] = config.train.ema_decay
    off = {k: list(getattr(config.serve, k)) for k in ("off_layers", "off_orders")}
    result |= {key: values for key, values in off.items() if values}
    if found.changes:
        result["changed_settings"] = {key: list(both) for key, both in found.changes.items()}
    if not found.same_text:
        return {**result, "another_text": True}
    if not any(covers([DATA], key) for key in found.changes):  # the run's own batches
        tell("looking for the n-grams of context in the training text")
        contexts = seen_contexts(found.data, found.step)
        result[BY_CONTEXT] = losses_by_context(contexts, {config.name: nats})
        own = not found.changes and not config.serve.ema and not any(off.values())
        if own and jax.process_index() == 0:
            file = file_of_step(workdir, HELD_OUT_DOCUMENTS, found.step)
            store = found.data.prepared.store_valid
            try:
                write_documents(file, store, nats, contexts, found.step)
                result["documents"] = str(file)
            except OSError as error:
                processes.warn(f"{file} cannot be written: {error.strerror}")
    return result


def perplexity(loss: float) -> float:
    """exp(loss); infinite on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_scored_tokenizer(workdir: Path, data: RunData) -> None:
    """Raises UserError unless the data was tokenised with the tokenizer of the run in `workdir`."""
    file = workdir / TOKENIZER
    theirs = tokenizer_fingerprint(load_tokenizer(file))
    ours = tokenizer_fingerprint(data.prepared.tokenizer)
    if theirs != ours:
        raise UserError(
            f"tokenizer {ours} (of this data) differs from {theirs}, which the model in {workdir}"
            f" was trained with; to score it on this data set config.tokenizer.path={file}"
        )


def table(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    lines = []
    for key, value in result.items():
        if key == BY_CONTEXT:
            lines += context_lines(value, result["name"])
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            lines.append(f"{key:18}{shown}")
    return "\n".join(lines)
