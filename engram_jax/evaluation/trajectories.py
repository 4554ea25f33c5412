"""Named texts that are scored while training (train.evaluations), each every so many steps.

They read the state and the texts alone: a run's steps, checkpoints and data are the same with them
and without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engram_jax.config import Config
from engram_jax.config.named_paths import NamedPath, evaluated_path
from engram_jax.data.named_texts import ReadText, read_text
from engram_jax.data.run_data import RunData
from engram_jax.distributed.consensus import agree
from engram_jax.evaluation.held_out import Evaluator, Scored
from engram_jax.evaluation.target_losses import held_out_sequences
from engram_jax.evaluation.text_scores import (
    TextTargets,
    check_targets,
    read_alike,
    scores,
    targets_of,
)

KEY = "config.train.evaluations"


@dataclass(frozen=True)
class Trajectory:
    """A text and when it is scored.

    data: the run's, with the text as its held-out split. targets: of its first eval_batches
    batches.
    """

    name: str
    every: int
    data: RunData
    targets: TextTargets

    def due(self, step: int, last: int) -> bool:
        """Whether it is scored after `step` of `last` steps."""
        return step % self.every == 0 or step == last

    def score(self, evaluator: Evaluator, state: Scored) -> dict[str, float]:
        """The metrics of a state. evaluator: of the run; this text is scored with its steps."""
        batches = self.data.config.train.eval_batches
        nats = evaluator.over(self.data).target_nats(state, batches)
        found = scores(self.targets, nats)
        told = {key: found[key] for key in ("nats_per_token", "bits_per_byte", "tokens", "bytes")}
        return {f"evaluations/{self.name}/{k}": v for k, v in told.items() if v is not None}


def open_trajectories(
    config: Config, data: RunData, log: Callable[[str], None]
) -> list[Trajectory]:
    """Those of the configuration, their texts read and tokenised. Raises UserError for a path that
    is not there, and a text with nothing to predict."""
    found = []
    for given in config.train.evaluations:
        named = evaluated_path(given)
        assert named is not None  # config/validate_training.py
        text = read_alike(partial(_read, named, config, data, log), named.name)
        prepared = dataclasses.replace(data.prepared, store_valid=text.store)
        own = dataclasses.replace(data, prepared=prepared)
        agree(partial(check_targets, f"{KEY}: {named.name}", own, config.train.eval_batches))
        most = config.train.eval_batches * config.data.batch_size
        targets = targets_of(text.store, config.data.seq_len, held_out_sequences(own).targets(most))
        found.append(Trajectory(named.name, named.every or config.train.eval_every, own, targets))
    return found


def _read(named: NamedPath, config: Config, data: RunData, log: Callable[[str], None]) -> ReadText:
    prepared = data.prepared
    how = config, prepared.tokenizer, prepared.eos_id
    return read_text(named.name, named.path, *how, KEY, log)
