"""The Python interface: build, train, evaluate, generate, and look into the memory, in a notebook.

    from engram_jax import api

    model = api.build(api.configure("configs/engram_tiny.py"), tokenizer)
    state = api.init(model)
    state, losses = api.train(model, state, api.encode(model, texts))

docs/api_guide.md goes through it. What this package exports is what it promises; all of it takes a
`Model` and a training state and returns arrays, and keeps nothing between calls but compiled
programs, in the `Model`. A mistake raises `UserError`, one line. No setting of JAX is changed, and
importing this imports no JAX: a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_jax.analysis.memory_reading import MemoryReading
    from engram_jax.api.analysis import (
        RowAnswer,
        layer_similarity,
        log_lens,
        row_answers,
        sensitivity,
        usage,
    )
    from engram_jax.api.budgets import budget, solve
    from engram_jax.api.generation import generate
    from engram_jax.api.memory import addresses, canonical_ids, hash_plan, read_memory, slots
    from engram_jax.api.models import Model, build, configure, encode, init, switch_off
    from engram_jax.api.runs import Run, open_run, run_documents, save_run
    from engram_jax.api.texts import Text, open_text
    from engram_jax.api.training import Losses, batches, evaluate, train, train_step
    from engram_jax.config.errors import UserError
    from engram_jax.data.train_bpe import train_bpe
    from engram_jax.model.budgets import Budget
    from engram_jax.serve.request import Completion, SamplingParams

_FROM = {
    "analysis.memory_reading": ("MemoryReading",),
    "api.analysis": (
        *("RowAnswer", "layer_similarity", "log_lens"),
        *("row_answers", "sensitivity", "usage"),
    ),
    "api.budgets": ("budget", "solve"),
    "api.generation": ("generate",),
    "api.memory": ("addresses", "canonical_ids", "hash_plan", "read_memory", "slots"),
    "api.models": ("Model", "build", "configure", "encode", "init", "switch_off"),
    "api.runs": ("Run", "open_run", "run_documents", "save_run"),
    "api.training": ("Losses", "batches", "evaluate", "train", "train_step"),
    "api.texts": ("Text", "open_text"),
    "config.errors": ("UserError",),
    "data.train_bpe": ("train_bpe",),
    "model.budgets": ("Budget",),
    "serve.request": ("Completion", "SamplingParams"),
}
_HOME = {name: module for module, names in _FROM.items() for name in names}

__all__ = [
    "Budget",
    "Completion",
    "Losses",
    "MemoryReading",
    "Model",
    "RowAnswer",
    "Run",
    "SamplingParams",
    "Text",
    "UserError",
    "addresses",
    "batches",
    "budget",
    "build",
    "canonical_ids",
    "configure",
    "encode",
    "evaluate",
    "generate",
    "hash_plan",
    "init",
    "layer_similarity",
    "log_lens",
    "open_run",
    "open_text",
    "read_memory",
    "row_answers",
    "run_documents",
    "save_run",
    "sensitivity",
    "slots",
    "solve",
    "switch_off",
    "train",
    "train_bpe",
    "train_step",
    "usage",
]


def __getattr__(name: str) -> Any:
    """Load what is exported when it is first used (PEP 562): importing JAX takes seconds."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"engram_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
