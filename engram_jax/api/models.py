"""Configurations, models and their first variables; documents from texts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from engram_jax.addressing import build_addressing, load_tokenizer, same_tokenizer
from engram_jax.addressing.tokenizer import check_encodes, encode_batch, tokenizer_fingerprint
from engram_jax.analysis.memory_reading import jit_reading
from engram_jax.config import SCONE, Config, ServeConfig, parse_config, to_dict, with_changes
from engram_jax.config.errors import UserError, shown
from engram_jax.data.array_store import ArrayStore
from engram_jax.data.prepared import of_arrays
from engram_jax.data.run_data import RunData
from engram_jax.data.train_bpe import find_eos
from engram_jax.evaluation.held_out import Evaluator
from engram_jax.run.ancestry import find_ancestor, start_from, with_tokenizer
from engram_jax.run.command_line import config_file
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.training.state import (
    TrainingProgram,
    TrainState,
    build_training,
    check_fits,
    create_state,
)
from engram_jax.training.step import jit_train_step

Source: TypeAlias = str | os.PathLike[str] | Config | ConfigDict | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its addressing and optimizer; it holds no arrays but constants.

    program: configuration, mesh, addressing, network (training/state.py). tokenizer: None where
    token ids are all there is. eos_id: ends a document and a sequence; None = nothing does.

    It keeps what has been compiled for it.
    """

    program: TrainingProgram
    tokenizer: Any = None
    eos_id: int | None = None

    @property
    def config(self) -> Config:
        """The validated configuration; `to_dict` of it is what run.json stores."""
        return self.program.config

    def data(self, store: ArrayStore) -> RunData:
        """Documents as the data of a run."""
        prepared = of_arrays(store, self.tokenizer, self.eos_id)
        return RunData(self.config, prepared, self.program.addressing)

    def evaluator(self, store: ArrayStore) -> Evaluator:
        """The evaluator over some documents, with this model's switches."""
        return self._evaluator.over(self.data(store))

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.program, cast(RunData, None), self.config.serve)

    @cached_property
    def engine_steps(self) -> dict[ServeConfig, EngineSteps]:
        """The engine's compiled steps by its configuration."""
        return {}

    @cached_property
    def step(self) -> Any:
        """The compiled training step."""
        return jit_train_step(self.program)

    @cached_property
    def reading(self) -> Any:
        """The compiled `analysis.memory_reading`."""
        return jit_reading(self.program, self.config.serve)

    def ids(self, text: str | Sequence[int] | np.ndarray, what: str) -> np.ndarray:
        """int32 [n], n at least 1: of token ids, or of a text, as training encodes it. Raises
        UserError, in whose line it is called `what`."""
        vocab = self.config.tokenizer.vocab_size
        if isinstance(text, str):
            if self.tokenizer is None:
                raise UserError(f"{what}: is text, and the model has no tokenizer; give token ids")
            text = encode_batch(self.tokenizer, [text])[0].ids
        ids = np.asarray(text)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise UserError(f"{what}: must be a text or token ids [n], with at least one token")
        if wrong := [int(i) for i in ids if not 0 <= i < vocab]:
            raise UserError(f"{what}: token id {wrong[0]}: must be from 0 to {vocab - 1}")
        return ids.astype(np.int32)


def configure(source: Source | None = None, changes: Mapping[str, Any] | None = None) -> Config:
    """A validated configuration.

    source: a file with `get_config` ("configs/engram_tiny.py"), an ml_collections.ConfigDict, a
      mapping, a Config; what it lacks has its default. None = the defaults.
    changes: values in place of its own, by key: {"train.steps": 60}, or nested, as in a mapping.

    Raises UserError naming the key, its value and what is allowed (docs/configuration.md).

    Example: `configure("configs/engram_tiny.py", {"data.seq_len": 128})`.
    """
    if isinstance(source, str | os.PathLike):
        source = config_file("configuration", os.fspath(source))
    if isinstance(source, Config):
        source = to_dict(source)
    if isinstance(source, ConfigDict):
        source = source.to_dict()
    if source is not None and not isinstance(source, Mapping):
        what = type(source).__name__
        raise UserError(f"configuration: is {what}, must be a file, a ConfigDict or a mapping")
    values = with_changes(to_dict(Config()), source or {})
    return parse_config(with_changes(values, changes or {}))


def build(config: Source, tokenizer: Tokenizer | str | os.PathLike[str] | None = None) -> Model:
    """The model of a configuration, on all devices, as config.mesh says.

    config: as for `configure`.
    tokenizer: of the `tokenizers` package, or the path of a tokenizer.json; by default
      config.tokenizer.path. Without any, a model takes token ids only; its Engram layers then must
      hash raw ids (model.engram.compression=False).

    Raises UserError for a tokenizer that does not fit, for addresses that need one, for a mesh that
    does not fit the devices, and if JAX draws random numbers otherwise than by default
    (jax_threefry_partitionable): initial values would be other ones.

    Example: `build(configure("configs/engram_tiny.py"), "tokenizer.json")`.
    """
    if not getattr(jax.config, "jax_threefry_partitionable", True):
        raise UserError(
            "jax_threefry_partitionable = False: must be True, JAX's default; a seed would give"
            " other initial values and texts than launch.py's"
        )
    config = with_tokenizer(configure(config), None)
    path = config.tokenizer.path
    found, eos_id = None, config.tokenizer.eos_id
    if tokenizer is not None or path:
        given = path if tokenizer is None else tokenizer
        if isinstance(given, Tokenizer):
            found, name = same_tokenizer(given), ""
        else:
            found, name = load_tokenizer(os.fspath(given)), os.fspath(given)
        if path and tokenizer is not None:
            _check_one(found, path)
        check_encodes(found, name)
        eos_id = find_eos(found, config.tokenizer)
    _check_addressing(config, found)
    layers, addressing = config.model.engram.layers, None
    if layers or found is not None:  # which checks the tokenizer, whether there is memory or not
        addressing = build_addressing(config, found)
    program = build_training(config, addressing if layers else None)
    return Model(program, found, eos_id if eos_id >= 0 else None)


def _check_one(found: Tokenizer, path: str) -> None:
    if tokenizer_fingerprint(found) != tokenizer_fingerprint(load_tokenizer(path)):
        raise UserError(
            f"tokenizer: is another one than config.tokenizer.path = {shown(path, quoted=True)};"
            " give one of them"
        )


def _check_addressing(config: Config, tokenizer: Tokenizer | None) -> None:
    engram = config.model.engram
    if not engram.layers:
        return
    if engram.form == SCONE:
        raise UserError(
            f"config.model.engram.form = {SCONE!r}: its n-grams are counted on a run's text; train"
            " it with launch.py, and open that run"
        )
    if tokenizer is None and (not engram.hashes_raw_ids or engram.case):
        key = "case" if engram.hashes_raw_ids else "compression"
        raise UserError(
            f"config.model.engram.{key} = True: is made from a tokenizer; give tokenizer=, or set"
            " it to False for token ids alone"
        )


def init(model: Model) -> TrainState:
    """The state before the first step: parameters, tables, moments, a function of
    config.train.seed alone; with config.train.init_from, weights and tables of another run.

    Raises UserError if it does not fit in memory, or for a run that it cannot start from.

    Example: `state = init(model); state.params["embedding"].shape` is (V, d);
    `state.memory["1"].rows` is layer 1's table, [R, dim].
    """
    check_fits(model.program)
    ancestor = find_ancestor(model.config, None)
    if ancestor is None:
        return create_state(model.program)
    return start_from(model.program, ancestor, lambda line: None)[0]


def encode(model: Model, texts: Sequence[str]) -> list[np.ndarray]:
    """Texts as documents: int32 [n] each, with the id that ends a document behind, if there is one.

    Special tokens that are spelled in a text are text. Raises UserError without a tokenizer.

    Example: `encode(model, ["def f(x):", "a b c"])`.
    """
    if model.tokenizer is None:
        raise UserError("texts: the model has no tokenizer; give documents as arrays of token ids")
    if isinstance(texts, str):
        raise UserError("texts: is one text; must be a list of texts")
    end = [] if model.eos_id is None else [model.eos_id]
    found = encode_batch(model.tokenizer, list(texts))
    return [np.asarray([*encoding.ids, *end], np.int32) for encoding in found]


def switch_off(model: Model, layers: Sequence[int] = (), orders: Sequence[int] = ()) -> Model:
    """The model with Engram layers that add nothing, and n-gram orders whose rows are taken as
    zero, for analysis: in `evaluate`, `generate` and `read_memory`. It takes the same state.

    layers: layer ids from 0; (-1,) = all. orders: n of the n-grams. Neither: all are on again.

    Raises UserError for an order that the model does not have.

    Example: `evaluate(switch_off(model, layers=[1]), state, documents).loss`.
    """
    there = model.config.model.engram.layers
    for layer in layers:
        if layer != -1 and layer not in there:
            known = ", ".join(map(str, there)) or "none"
            raise UserError(f"layers: {layer} is no Engram layer; there are {known}; -1 = all")
    off = {"off_layers": tuple(layers), "off_orders": tuple(orders)}
    config = configure(model.config, {"serve": off})
    program = dataclasses.replace(model.program, config=config)
    return Model(program, model.tokenizer, model.eos_id)
