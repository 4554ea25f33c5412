"""Training steps, a training loop and losses, over documents that are arrays of token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from engram_jax.api.models import Model
from engram_jax.config.errors import UserError
from engram_jax.data.array_store import array_store
from engram_jax.data.packing import Batch
from engram_jax.data.placement import place_batch
from engram_jax.training.state import TrainState
from engram_jax.training.step import INPUTS

Documents = Sequence[Any] | np.ndarray


class NotFiniteError(UserError):
    """A loss or gradient that is not finite. state: as it was before that step."""

    def __init__(self, line: str, state: TrainState):
        super().__init__(line)
        self.state = state


@dataclass(frozen=True)
class Losses:
    """Losses of documents.

    loss: nats per target, the mean over all `targets`; a target is any token of a document but its
    first. nats: of each document, float64 [n - 1], the loss of its tokens from the second on.
    """

    loss: float
    targets: int
    nats: list[np.ndarray]


def batches(model: Model, documents: Documents, start: int = 0) -> Iterator[Batch]:
    """Endless training batches, as launch.py makes them: documents one behind the other, cut into
    sequences, in an order that config.data.seed shuffles anew in every epoch.

    documents: token ids [n] each, whole numbers, the end of a document included where there is one;
      an array [N, n] is N documents. start: how many batches to leave out.

    A batch is a dict: tokens, targets, segments, positions int32 [B, T], loss_mask float32 [B, T]
    (data/packing.py: PackedSequences.batch), B = config.data.batch_size, T = config.data.seq_len.
    One of your own needs the same keys.

    Raises UserError for ids that the model does not have, and for less than one batch of tokens.

    Example: `batch = next(batches(model, documents))`.
    """
    store = array_store(documents, model.config.tokenizer.vocab_size)
    found = model.data(store).train_iterator(model.program.mesh)
    if start:
        found.set_state({**found.get_state(), "next_batch": start})
    return found


def train_step(
    model: Model, state: TrainState, batch: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """One update: (the new state, its metrics, arrays on the device).

    The given state's arrays are reused for the new one, and cannot be used afterwards. Metrics:
    loss (nats per target), grad_norm, learning_rate, finite, and those that
    training/step.py: train_step names. A loss or gradient that is not finite changes nothing.

    Raises UserError for a batch of another shape, or a model with something switched off.

    Example: `state, metrics = train_step(model, state, batch); float(metrics["loss"])`.
    """
    _check_on(model)
    size = model.config.data.batch_size
    return model.step(state, place_batch(model.program.mesh, _checked(model, batch), size))


def _check_on(model: Model) -> None:
    serve = model.config.serve
    if serve.off_layers or serve.off_orders:
        raise UserError(
            f"config.serve.off_layers = {serve.off_layers}, off_orders = {serve.off_orders}: a"
            " model is trained with all that it has; switch_off(model) has everything on"
        )


def _checked(model: Model, batch: Mapping[str, Any]) -> Batch:
    data = model.config.data
    shape = data.batch_size, data.seq_len
    found: Batch = {}
    for name in INPUTS:
        if name not in batch:
            raise UserError(f"batch: has no {name!r}; must have {', '.join(INPUTS)}")
        found[name] = np.asarray(batch[name], np.float32 if name == "loss_mask" else np.int32)
        if found[name].shape != shape:
            raise UserError(
                f"batch[{name!r}]: is of shape {list(found[name].shape)}, must be {list(shape)}:"
                " config.data.batch_size and seq_len"
            )
    return {**found, **{k: v for k, v in batch.items() if k == "addresses"}}


def train(
    model: Model,
    state: TrainState,
    documents: Documents,
    steps: int | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> tuple[TrainState, np.ndarray]:
    """Train on documents: (the state after the last step, losses float64 [steps], nats per target).

    It goes on where the state stands: with the batch and the learning rate of its step, so that two
    calls of 10 steps are one of 20, bit for bit. The schedule's end is config.train.steps.

    documents: as for `batches`. steps: how many to make; by default all that are left.
    on_step: called with the number of each step that was made, from 1, and its metrics as NumPy
      arrays, one step behind.

    The given state cannot be used afterwards (`train_step`). Raises UserError as `batches`, for
    more steps than the schedule has, and for a loss that is not finite; the error's `state` is that
    before the step.

    Example: `state, losses = train(model, state, documents, steps=100)`.
    """
    _check_on(model)
    total, first = model.config.train.steps, int(state.step)
    steps = total - first if steps is None else steps
    if not 0 <= steps <= total - first:
        raise UserError(
            f"steps = {steps}: the state has made {first} of config.train.steps = {total}; must be"
            f" from 0 to {total - first}"
        )
    losses = np.zeros(steps)

    def read(number: int, metrics: dict[str, Any]) -> None:
        found = jax.device_get(metrics)
        losses[number - first] = found["loss"]
        if not found["finite"]:
            norm = float(found["grad_norm"])
            line = f"step {number}: loss {losses[number - first]}, gradient norm {norm}: not finite"
            going = jax.device_put(np.zeros((), bool), state.halted.sharding)
            raise NotFiniteError(line, dataclasses.replace(state, halted=going))
        if on_step is not None:
            on_step(number + 1, found)

    pending: tuple[int, dict[str, Any]] | None = None
    with closing(batches(model, documents, first)) as stream:  # type: ignore[type-var]
        for number in range(first, first + steps):
            state, metrics = train_step(model, state, next(stream))
            if pending is not None:
                read(*pending)
            pending = number, metrics
    if pending is not None:
        read(*pending)
    return state, losses


def evaluate(model: Model, state: TrainState, documents: Documents) -> Losses:
    """The loss of every token of documents that has one before it, as launch.py's --mode=evaluate
    computes it: packed into sequences of config.data.seq_len tokens, which hide what is before.

    documents: as for `batches`. What `switch_off` has switched off adds nothing.

    Raises UserError for ids that the model does not have, and without a token to predict.

    Example: `found = evaluate(model, state, documents); found.loss, found.nats[0]`.
    """
    store = array_store(documents, model.config.tokenizer.vocab_size)
    if len(store) == store.documents:
        raise UserError("documents: no token to predict; nothing predicts the first of a document")
    nats = model.evaluator(store).target_nats(state)
    ends = np.cumsum(np.diff(store.starts) - 1)[:-1]
    return Losses(float(nats.mean()), len(nats), np.split(nats, ends))
