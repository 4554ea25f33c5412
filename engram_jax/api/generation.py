"""Continues prompts, through the serving engine."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from engram_jax.api.models import Model
from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.config.errors import UserError
from engram_jax.serve.compatibility import for_prompts
from engram_jax.serve.open_engine import check_memory, compile_for, engine_of, stored_rows
from engram_jax.serve.request import Completion, SamplingParams
from engram_jax.training.state import TrainState, weights_of


def generate(
    model: Model,
    state: TrainState,
    prompts: Sequence[str | Sequence[int] | np.ndarray],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
) -> list[Completion]:
    """The completion of every prompt, in order: its text, tokens and, if asked for,
    log-probabilities (nats).

    prompts: texts or token ids; not empty. params: for all, or one each; by default
      config.generate's, which --mode=generate uses, too: a prompt by itself gets the same tokens.

    The engine is that of the server (serve/engine.py), with the tables on the device. It is
    compiled for each number of prompts and length of the longest, answer included, once.

    Raises UserError for a prompt without tokens, for more tokens than the model was trained on
    (config.data.seq_len; config.serve.accept_longer allows it, with a warning), and for what a
    request must not ask for.

    Example: `generate(model, state, ["def main("], SamplingParams(max_tokens=16))[0].text`.
    """
    if isinstance(prompts, str):
        raise UserError("prompts: is one text; must be a list of prompts")
    config = model.config
    if key := stored_rows(config.serve):
        raise UserError(f"{key}: generate() has the tables on the device; leave it out")
    ids = [model.ids(prompt, f"prompts[{i}]").tolist() for i, prompt in enumerate(prompts)]
    if params is None:
        params = SamplingParams.of(config.generate)
    each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(ids):
        raise UserError(f"params: {len(each)} for {len(ids)} prompts; must be one, or one each")
    if not ids:
        return []
    trained = LoadedModel(
        program=model.program,
        weights=weights_of(model.program, state),
        tokenizer=model.tokenizer,
        eos_id=-1 if model.eos_id is None else model.eos_id,
        step=int(state.step),
        run=config.name,
        digest="",
        seq_len=config.data.seq_len,
    )
    lengths = [len(prompt) + own.max_tokens for prompt, own in zip(ids, each, strict=True)]
    serve = for_prompts(trained, config.serve, lengths, _warn)
    if serve not in model.engine_steps:
        check_memory(dataclasses.replace(config, serve=serve), serve.capacity)
        model.engine_steps[serve] = compile_for(trained, serve)
    engine = engine_of(trained, model.engine_steps[serve], _warn)
    try:
        return engine.generate(ids, each)
    finally:
        engine.close()


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)
