"""Checks that rows belong to the weights, and that sequences do not exceed the trained length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.config.validate import validate

if TYPE_CHECKING:  # of the extra `serve`
    from engram_jax.memory.store.memory_file import MemoryFile

CHECKPOINT = "checkpoint"  # in a memory file's metadata: the digest of its checkpoint
_SHOWN = 12  # digits of a digest
Warn = Callable[[str], None]


def origin(trained: LoadedModel) -> dict[str, str]:
    """A memory file's metadata about the checkpoint that its rows are from."""
    return {
        "name": trained.program.config.name,
        "run": trained.run,
        "step": str(trained.step),
        CHECKPOINT: trained.digest,
    }


def check_memory_file(
    file: MemoryFile, trained: LoadedModel, serve: ServeConfig, warn: Warn
) -> None:
    """Raises UserError for rows of another checkpoint than the weights, or warns if
    serve.accept_other_memory is set. The rows' format makes no difference."""
    said = file.metadata
    parts = [said.get("name", "a model without a name")]
    parts += [f"{key} {said[key]}" for key in ("run", "step") if key in said]
    theirs, mine = ", ".join(parts), trained.name
    if CHECKPOINT in said:
        if said[CHECKPOINT] == trained.digest:
            return
        theirs += f", checkpoint {said[CHECKPOINT][:_SHOWN]}"
        mine += f", checkpoint {trained.digest[:_SHOWN]}"
    elif said.get("step", str(trained.step)) == str(trained.step):
        warn(
            f"{serve.memory_file} (of {theirs}) does not say which checkpoint its rows are of: it"
            f" was not checked that they belong to the weights ({mine}); export it again"
        )
        return
    line = f"{serve.memory_file}: holds the rows of {theirs}; the weights are those of {mine}"
    if not serve.accept_other_memory:
        raise UserError(
            f"{line}; export it again (--mode=export-memory), or set"
            " config.serve.accept_other_memory=True"
        )
    warn(line)


def with_capacity(trained: LoadedModel, serve: ServeConfig, warn: Warn) -> ServeConfig:
    """`serve` with its capacity in tokens; 0 becomes the length the model was last trained with.

    Raises UserError for more than that, or warns if serve.accept_longer is set.
    """
    serve = replace(serve, capacity=serve.capacity or trained.seq_len)
    validate(replace(trained.program.config, serve=serve))
    _check_length(f"config.serve.capacity = {serve.capacity}", serve.capacity, trained, serve, warn)
    return serve


def for_one(
    trained: LoadedModel, serve: ServeConfig, prompt: int, answer: int, warn: Warn
) -> ServeConfig:
    """`serve` for a single sequence of `prompt` + `answer` tokens, where `answer` is
    config.generate.max_tokens. Errors: as `with_capacity`."""
    what = f"config.generate.max_tokens = {answer}, with a prompt of {prompt} tokens"
    _check_length(what, prompt + answer, trained, serve, warn)
    return replace(serve, sequences=1, prefill_sequences=1, pages=0, capacity=prompt + answer)


def for_prompts(
    trained: LoadedModel, serve: ServeConfig, lengths: Sequence[int], warn: Warn
) -> ServeConfig:
    """`serve` for sequences of known lengths, prompt and answer in tokens; of a single one what
    `for_one` gives. Errors: as `with_capacity`."""
    most = max(lengths)
    _check_length(f"a prompt and max_tokens of {most} tokens together", most, trained, serve, warn)
    return replace(
        serve,
        sequences=min(len(lengths), serve.sequences),
        prefill_sequences=min(len(lengths), serve.prefill_sequences),
        pages=0,
        capacity=most,
    )


def _check_length(
    what: str, tokens: int, trained: LoadedModel, serve: ServeConfig, warn: Warn
) -> None:
    if tokens <= trained.seq_len:
        return
    line = f"{what}: {trained.name} was trained on sequences of {trained.seq_len} tokens"
    if not serve.accept_longer:
        raise UserError(
            f"{line} and knows none that are longer; config.serve.accept_longer=True tries it"
        )
    warn(f"{line}; what it says beyond that is untested")
