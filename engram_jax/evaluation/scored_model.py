"""A checkpoint loaded to score texts with that its run need not know of: no optimizer, no text of
the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.load_model import LoadedModel, load_model
from engram_jax.config import Config
from engram_jax.data.array_store import Store
from engram_jax.data.prepared import PreparedData
from engram_jax.data.run_data import RunData
from engram_jax.data.source_report import SourceReport
from engram_jax.memory.table import Table
from engram_jax.model.program import Program


@dataclass(frozen=True)
class ScoredModel:
    """A model as `Evaluator` takes it: params, router_bias and memory are those of its state.

    loaded: where it is from, without its weights.
    """

    program: Program
    loaded: LoadedModel
    params: Any
    router_bias: Any
    memory: dict[str, Table]

    def data_of(self, store: Store) -> RunData:
        """A store's documents as the held-out text of the run's configuration."""
        found = self.loaded
        prepared = PreparedData(
            tokenizer=found.tokenizer,
            tokenizer_path=Path(),
            eos_id=found.eos_id,
            store_train=store,
            store_valid=store,
            report=SourceReport(),
            fingerprint="",
        )
        return RunData(self.program.config, prepared, self.program.addressing)


def open_scored(
    config: Config,
    workdir: Path,
    step: str,
    accept: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> ScoredModel:
    """A checkpoint of a run; arguments and errors as of `load_model`."""
    loaded = load_model(config, workdir, step, accept=accept, tell=tell)
    program, weights = loaded.program, loaded.weights
    rows = table_order.as_stored(program, dict(weights.rows))
    memory = {layer: Table(table, None, None) for layer, table in rows.items()}
    without = dataclasses.replace(loaded, weights=dataclasses.replace(weights, rows={}))
    return ScoredModel(program, without, weights.params, weights.router_bias, memory)
