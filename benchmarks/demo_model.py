"""The demo model on synthetic tokens: its training step without data, files or a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs import engram_tiny
from engram_jax import config as config_lib
from engram_jax.addressing import artifact
from engram_jax.config import Config
from engram_jax.training.state import TrainingProgram, build_training, create_state
from engram_jax.training.step import jit_train_step

BATCHES = 8  # distinct ones: a repeated batch would find its rows in the processor's caches


def demo_config(**engram: Any) -> Config:
    """configs/engram_tiny.py with a recorded canonical vocabulary and these keys of its memory."""
    config = engram_tiny.get_config()
    config.tokenizer.canonical_vocab_size = canonical_size(config.tokenizer.vocab_size)
    config.model.engram.update(engram)
    return config_lib.parse_config(config)


def canonical_size(vocab_size: int) -> int:
    """About what a real tokenizer compresses to (DeepSeek-V3's: 76.6 %)."""
    return round(0.766 * vocab_size)


def demo_program(config: Config, mesh: Mesh | None = None) -> TrainingProgram:
    """The program of a configuration, with a made-up map from token ids to canonical ids."""
    if not config.model.engram.layers:
        return build_training(config, None, mesh)
    ids = np.arange(config.tokenizer.vocab_size, dtype=np.int32)
    compression = ids % canonical_size(len(ids))
    addressing = dataclasses.replace(
        artifact.build_addressing(config, None), compression=compression
    )
    return build_training(config, addressing, mesh)


def batches(config: Config) -> list[dict[str, jax.Array]]:
    """Uniform tokens (the fewest equal rows, the worst case), one document per sequence."""
    shape = (config.data.batch_size, config.data.seq_len)
    rng = np.random.default_rng(0)
    made = []
    for _ in range(BATCHES):
        tokens = jnp.asarray(rng.integers(0, config.tokenizer.vocab_size, shape), jnp.int32)
        made.append(
            {
                "tokens": tokens,
                "targets": jnp.roll(tokens, -1, axis=1),
                "loss_mask": jnp.ones(shape, jnp.float32),
                "segments": jnp.ones(shape, jnp.int32),
                "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
            }
        )
    return made


class Training:
    """A run in progress: every call is one more step, and returns when it is done."""

    def __init__(self, program: TrainingProgram, batches: list[dict[str, jax.Array]]):
        self.state = create_state(program)
        self.step: Callable[..., Any] = jit_train_step(program)
        self.batches, self.steps = batches, 0

    def __call__(self) -> None:
        batch = self.batches[self.steps % len(self.batches)]
        self.state, metrics = jax.block_until_ready(self.step(self.state, batch))
        self.steps += 1
        if not metrics["finite"]:
            raise AssertionError(f"step {self.steps}: loss {metrics['loss']} is not finite")
