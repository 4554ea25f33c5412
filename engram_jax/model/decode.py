"""Reference decoding: prefill the prompts, then generate one token at a time.

A training run's samples are generated here, on any number of processes, and the inference engine
(serve/) is tested against it. Serving does not use it: its sequences, of any length, share pages,
and its rows may come from host memory or a file.

A sequence carries three things: MLA's latent cache, the last N - 1 canonical ids (its n-gram
history) and the tail of the short convolution. With them, prefill + decode equals the full forward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import hash_jax
from engram_jax.config import GenerateConfig
from engram_jax.config.errors import UserError
from engram_jax.memory.table import lookup
from engram_jax.model.decode_state import DecodeState
from engram_jax.model.program import Program, Weights, check_decodes
from engram_jax.model.sampling import drawable_logits, key_of_token, sample
from engram_jax.sharding.rules import BATCH, P, names

PREFILL_MULTIPLE = 32  # prompts are padded to a multiple of this, to compile few shapes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Session:
    """A batch of sequences in progress; history: canonical ids int32 [B, N - 1], oldest first."""

    decode: DecodeState
    history: jax.Array


def start(program: Program, weights: Weights, batch: int, capacity: int) -> Session:
    """`batch` empty sequences with room for `capacity` tokens each. Raises UserError for a model
    that cannot decode (`check_decodes`)."""
    check_decodes(program.config)
    model = program.model(weights.params, weights.router_bias)
    layers = list(program.addressing.layers.values()) if program.addressing else []
    history = jnp.zeros((batch, 0), jnp.int32)
    if layers:
        history = hash_jax.empty_history(layers[0], (batch,))
    return Session(model.init_decode(batch, capacity), history)


def extend(
    program: Program, weights: Weights, tokens: jax.Array, valid: jax.Array, session: Session
) -> tuple[jax.Array, Session]:
    """Feed tokens int32 [B, S], of which the first valid[b] >= 1 are real.

    Returns the logits after each row's last real token, [B, V] float32, and the session.
    """
    model = program.model(weights.params, weights.router_bias)
    rows, history = {}, session.history
    if program.addressing is not None and program.addressing.layers:
        canonical = program.canonical(tokens)
        for layer_id, layer in program.addressing.layers.items():
            ids = hash_jax.addresses(canonical, layer, None, session.history)
            rows[str(layer_id)] = lookup(weights.rows[str(layer_id)], ids)
        past = jnp.concatenate([session.history, canonical], axis=1)
        history = last_valid(past, session.history.shape[1], valid)
    mask = program.memory_mask(tokens)
    beside = program.beside(tokens, history=session.history)
    hidden, decode = model.cached(tokens, rows, valid, session.decode, mask, beside=beside)
    last = jnp.take_along_axis(hidden, (valid - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), Session(decode, history)


def session_shardings(program: Program, weights: Weights, batch: int) -> Session:
    """How a session is sharded: by sequences, or replicated if they do not divide over the devices.

    weights: arrays or shapes.
    """
    shards = BATCH if batch % program.axes.batch == 0 else None

    def sharding(path: Any, x: Any) -> NamedSharding:
        stacked = "caches" in names(path)  # over the layers of a stage
        return NamedSharding(program.mesh, P(None, shards) if stacked else P(shards))

    shapes = jax.eval_shape(lambda w: start(program, w, 1, 1), weights)
    return jax.tree_util.tree_map_with_path(sharding, shapes)


def jit_start(program: Program, session: Session) -> jax.stages.Wrapped:
    """`start` compiled; session: its `session_shardings`."""
    return program.jit(partial(start, program), static_argnums=(1, 2), out_shardings=session)


def jit_extend(program: Program, session: Session) -> jax.stages.Wrapped:
    """`extend` compiled; the old session's buffers are reused, so the caches are updated in place.
    Logits are replicated: every process reads the chosen tokens."""
    replicated = NamedSharding(program.mesh, P())
    return program.jit(
        partial(extend, program), donate_argnums=3, out_shardings=(replicated, session)
    )


class Generator:
    """Compiled prefill and decode for one model. drawable: bool [V], the ids that the tokenizer has
    (`addressing.drawable_ids`), the only ones that are drawn; None = all."""

    def __init__(self, program: Program, weights: Weights, drawable: np.ndarray | None = None):
        self.program, self.weights = program, weights
        self._compiled: dict[bool, tuple[Any, Any]] = {}
        replicated = NamedSharding(program.mesh, P())
        self._sample = jax.jit(
            lambda logits, key, **how: sample(drawable_logits(logits, drawable), key, **how),
            static_argnames=("temperature", "top_p", "top_k"),
            out_shardings=replicated,
        )

    def _functions(self, batch: int) -> tuple[Any, Any]:
        """start and extend, for batches that divide over the devices or for those that do not."""
        divides = batch % self.program.axes.batch == 0
        if divides not in self._compiled:
            session = session_shardings(self.program, self.weights, batch)
            made = jit_start(self.program, session), jit_extend(self.program, session)
            self._compiled[divides] = made
        return self._compiled[divides]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig,
        eos_id: int | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield, per step, the next token of every prompt (None once it has ended).

        prompts: token ids, at least one each. Ends after `max_tokens` steps (default: the
        configuration's) or when every sequence has produced `eos_id` (which is not yielded).
        """
        steps = config.max_tokens if max_tokens is None else max_tokens
        if not prompts or not all(len(p) for p in prompts):
            raise UserError("prompt: must have at least one token")
        batch = len(prompts)
        lengths = np.array([len(p) for p in prompts], np.int32)
        padded = _round_up(int(lengths.max()), PREFILL_MULTIPLE)
        tokens = np.zeros((batch, padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        capacity = _round_up(int(lengths.max()) + steps, PREFILL_MULTIPLE)
        begin, advance = self._functions(batch)
        session = begin(self.weights, batch, capacity)
        logits, session = advance(self.weights, tokens, lengths, session)
        ended = np.zeros(batch, bool)
        for step in range(steps):
            token = self._sample(
                logits,
                key_of_token(config.seed, step),
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
            )
            chosen = np.asarray(token)
            if eos_id is not None:
                ended |= chosen == eos_id
            if ended.all():
                return
            yield [None if end else int(t) for t, end in zip(chosen, ended, strict=True)]
            if step + 1 < steps:
                logits, session = advance(
                    self.weights, token[:, None], np.ones(batch, np.int32), session
                )

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig,
        eos_id: int | None = None,
        max_tokens: int | None = None,
    ) -> list[list[int]]:
        """The generated ids of every prompt."""
        out: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, config, eos_id, max_tokens):
            for ids, token in zip(out, step, strict=True):
                if token is not None:
                    ids.append(token)
        return out


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def last_valid(padded: jax.Array, keep: int, valid: jax.Array) -> jax.Array:
    """The last `keep` entries up to the valid[b]-th new one.

    padded: [B, keep + S, ...], `keep` old entries, then S new ones.
    """
    index = valid[:, None] + jnp.arange(keep)
    return jax.vmap(lambda x, i: x[i])(padded, index)
