"""The compiled parts of an engine's step: the model, split before each Engram layer; the sampler.

The first span needs tokens only. Every further one begins with an Engram module and needs its
rows; while they are being fetched, the device runs the span before. Shapes are fixed (the slots x
1 token, or `prefill_sequences` x `prefill_chunk`), so a sequence's results do not depend on the
others in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.config import ServeConfig
from engram_jax.model.program import Program, Weights, check_decodes
from engram_jax.model.sampling import (
    adjust_logits,
    drawable_logits,
    log_probabilities,
    sample_rows,
)
from engram_jax.model.switches import of_orders
from engram_jax.model.transformer import Transformer, spans
from engram_jax.serve.logit_rules import Adjustments, entries
from engram_jax.serve.request import MAX_LOGPROBS, MAX_NEXT
from engram_jax.sharding.rules import P, row_major


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The sequences' state on the device between steps.

    pool: [layers, pages, page, r + p], see MLA.paged.
    tails: Engram layer id -> the convolution's last inputs [slots, L, M, d], None without one.
    tokens: int32 [slots], the token sampled last.

    Arrays, or their shardings.
    """

    pool: Any
    tails: Any
    tokens: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """The sequences of a step.

    numbers: int32 [B, 5 + n]: slot (an unused row has the number of slots), tokens before, tokens
      now, tokens generated before, top_k; then the pages.
    seed: uint32 [B]. levels: float32 [B, 2], temperature and top_p.
    """

    numbers: jax.Array
    seed: jax.Array
    levels: jax.Array

    @property
    def slot(self) -> jax.Array:
        return self.numbers[:, 0]

    @property
    def start(self) -> jax.Array:
        return self.numbers[:, 1]

    @property
    def valid(self) -> jax.Array:
        return self.numbers[:, 2]

    @property
    def pages(self) -> jax.Array:
        return self.numbers[:, PAGES_FROM:]


PAGES_FROM = 5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Flow:
    """What one span passes to the next: tokens int32 [B, S], streams [B, S, M, d]."""

    tokens: jax.Array
    x: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """chosen float32 [...]; top and ids [..., K], the K likeliest, best first."""

    chosen: jax.Array
    top: jax.Array
    ids: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """tokens: int32 [B]. logits: float32 [B, V] they were drawn from. If asked for, logprobs: of
    the tokens; prompt: of the prompt tokens that follow the input ones [B, S]."""

    tokens: jax.Array
    logits: jax.Array
    logprobs: Logprobs | None
    prompt: Logprobs | None


class EngineSteps:
    """The compiled functions of one program. Raises UserError for one that cannot decode
    (`check_decodes`).

    drawable: bool [V], the ids that the tokenizer has (`addressing.drawable_ids`), None = all; no
    other is drawn, nor listed among the likeliest.
    """

    def __init__(self, program: Program, serve: ServeConfig, drawable: np.ndarray | None = None):
        check_decodes(program.config)
        self.drawable = drawable
        capacity = serve.capacity or program.config.data.seq_len
        self.program, self.serve = program, replace(serve, capacity=capacity)
        self.spans = spans(program.config.model)
        replicated = NamedSharding(program.mesh, P())
        cache = Cache(row_major(program.mesh, P(), 4), replicated, replicated)
        how: Any = {"donate_argnums": 1, "out_shardings": (replicated, cache)}
        self.layers = tuple(str(span[0].first) for span in self.spans[1:])
        self._first = program.jit(self._run_first, **how)
        self._middle = [
            program.jit(partial(self._run_span, i), **how) for i in range(1, len(self.spans))
        ]
        self._sample = program.jit(self._run_sample, static_argnames=("logprobs", "listed"), **how)
        self.following = program.jit(self._following, out_shardings=replicated)
        self._redraw = program.jit(self._run_redraw, out_shardings=replicated)
        self.fresh = program.jit(self._fresh, out_shardings=cache)
        self.swap_out = program.jit(self._swap_out, out_shardings=replicated)
        self.swap_in = program.jit(self._swap_in, donate_argnums=0, out_shardings=cache)
        self.fresh_kept = program.jit(self._fresh_kept, out_shardings=replicated)
        self.keep = program.jit(self._keep, donate_argnums=0, out_shardings=replicated)
        self.restore = program.jit(self._restore, donate_argnums=0, out_shardings=cache)

    @property
    def programs(self) -> dict[str, jax.stages.Wrapped]:
        """The compiled functions in the order a step runs them: "first", "span LAYER" for each
        Engram layer, "sample"."""
        spans = zip(self.layers, self._middle, strict=True)
        named = {f"span {layer}": function for layer, function in spans}
        return {"first": self._first, **named, "sample": self._sample}

    @property
    def page_count(self) -> int:
        """Pages of the pool."""
        return self.serve.pages or self.serve.sequences * self.pages_each

    @property
    def pages_each(self) -> int:
        """Pages of a sequence of full length."""
        return -(-self.serve.capacity // self.serve.page)

    @property
    def units(self) -> int:
        """The most beginnings of prompts that are kept (serve/prefixes.py)."""
        return self.serve.kept_prefixes(self.page_count)

    @property
    def shared_chunk(self) -> int:
        """Tokens of a prompt that are computed at a time; 0 = their pages are not shared."""
        return self.serve.prefill_chunk if self.serve.share_prefixes else 0

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens are listed at most."""
        vocab = self.program.config.tokenizer.vocab_size
        return min(MAX_LOGPROBS, vocab if self.drawable is None else int(self.drawable.sum()))

    @property
    def entries(self) -> int:
        """Tokens that a sequence's rules may touch."""
        return entries(self.serve.capacity, self.program.config.tokenizer.vocab_size)

    def first(self, weights: Weights, cache: Cache, batch: StepBatch, tokens: Any) -> Any:
        """Run tokens int32 [B, S] (None: those sampled last) through the layers before the first
        Engram layer.

        Returns (flow, cache); the given cache is donated, here and below.
        """
        return self._first(weights, cache, batch, tokens)

    def span(
        self,
        i: int,
        weights: Weights,
        cache: Cache,
        batch: StepBatch,
        flow: Flow,
        rows: Any,
        signs: Any = None,
    ):
        """Run the i-th span, from its Engram layer on. rows [B, S, H, dim], None = it is off; signs
        int8 [B, S, H] that they are read with, None = without."""
        return self._middle[i - 1](weights, cache, batch, flow, rows, signs)

    def sample(
        self,
        weights: Weights,
        cache: Cache,
        batch: StepBatch,
        flow: Flow,
        targets: Any = None,
        *,
        logprobs: bool,
        listed: int = 0,
    ) -> tuple[Sampled, Cache]:
        """Sample the next tokens, also stored in the cache. targets int32 [B, S]: the prompt token
        after each input one, whose log-probability is wanted, with the `listed` likeliest."""
        return self._sample(weights, cache, batch, flow, targets, logprobs=logprobs, listed=listed)

    def redraw(
        self, cache: Cache, batch: StepBatch, sampled: Sampled, rules: Adjustments
    ) -> tuple[Sampled, Cache]:
        """Draw again for the rows that have rules, from their adjusted logits; `sampled`, which
        must have log-probabilities, is as before for the others. A program of its own, behind that
        of `sample`: requests without rules are computed by the same programs, whoever is with
        them."""
        tokens, own, kept = self._redraw(
            cache.tokens, batch, sampled.tokens, sampled.logits, sampled.logprobs, rules
        )
        return replace(sampled, tokens=tokens, logprobs=own), replace(cache, tokens=kept)

    def _model(self, weights: Weights) -> Transformer:
        return self.program.model(weights.params, weights.router_bias)

    def _fresh(self, weights: Weights) -> Cache:
        model, serve = self._model(weights), self.serve
        attention, config = self.program.config.model.attention, self.program.config.model
        width = attention.kv_lora_rank + attention.rope_dim
        shape = (config.layers, self.page_count, serve.page, width)
        tails = {k: m.init_tail(serve.sequences, model.dtype) for k, m in model.engrams.items()}
        return Cache(jnp.zeros(shape, model.dtype), tails, jnp.zeros((serve.sequences,), jnp.int32))

    def _run_first(self, weights: Weights, cache: Cache, batch: StepBatch, tokens: Any) -> Any:
        model = self._model(weights)
        if tokens is None:
            tokens = cache.tokens.at[batch.slot].get(mode="clip")[:, None]
        return self._through(model, 0, cache, batch, Flow(tokens, model.embed(tokens)), None, None)

    def _run_span(
        self,
        i: int,
        weights: Weights,
        cache: Cache,
        batch: StepBatch,
        flow: Flow,
        rows: Any,
        signs: Any,
    ) -> tuple[Flow, Cache]:
        return self._through(self._model(weights), i, cache, batch, flow, rows, signs)

    def _through(
        self,
        model: Transformer,
        i: int,
        cache: Cache,
        batch: StepBatch,
        flow: Flow,
        rows: Any,
        signs: Any,
    ) -> tuple[Flow, Cache]:
        tails, tail, mask, kept = dict(cache.tails), None, None, None
        beside = None
        layer = self.layers[i - 1] if i else ""
        if rows is not None:
            mask = self.program.memory_mask(flow.tokens)
            beside = self.program.beside_in_layer(layer, flow.tokens, signs)
            rows = of_orders(self.program.config.model.engram, self.serve, rows)
            kept = tails[layer]
            if kept is not None:
                tail = kept.at[batch.slot].get(mode="clip")
                tail = jnp.where(batch.start[:, None, None, None] == 0, 0, tail)
        x, tail, pool = model.paged(
            self.spans[i],
            flow.x,
            rows,
            batch.start,
            batch.valid,
            mask,
            tail,
            batch.pages,
            cache.pool,
            beside=beside,
        )
        if kept is not None:
            tails[layer] = kept.at[batch.slot].set(tail, mode="drop")
        return Flow(flow.tokens, x), Cache(pool, tails, cache.tokens)

    def _run_sample(
        self,
        weights: Weights,
        cache: Cache,
        batch: StepBatch,
        flow: Flow,
        targets: Any,
        *,
        logprobs: bool,
        listed: int,
    ) -> tuple[Sampled, Cache]:
        model = self._model(weights)
        last = jnp.maximum(batch.valid - 1, 0)[:, None, None, None]
        # Always computed separately from the prompt's logits: another shape may round differently.
        logits = model.logits(model.finish(jnp.take_along_axis(flow.x, last, axis=1)))[:, 0]
        fed = None
        if targets is not None:
            all_logits = model.logits(model.finish(flow.x))
            fed = self._logprobs(all_logits, targets, listed)
        tokens = self._choose(logits, batch)
        own = None
        if logprobs:
            own = self._logprobs(logits, tokens, self.alternatives)
        kept = cache.tokens.at[batch.slot].set(tokens, mode="drop")
        return Sampled(tokens, logits, own, fed), Cache(cache.pool, cache.tails, kept)

    def _run_redraw(
        self,
        kept: jax.Array,
        batch: StepBatch,
        tokens: jax.Array,
        logits: jax.Array,
        own: Logprobs,
        rules: Adjustments,
    ) -> tuple[jax.Array, Logprobs, jax.Array]:
        other = adjust_logits(logits, rules.ids, rules.bias, rules.factor, rules.less, rules.only)
        tokens = jnp.where(rules.used, self._choose(other, batch, rules.min_p), tokens)
        # Of the model's own distribution, not of the one that was drawn from.
        again = self._logprobs(logits, tokens, self.alternatives)

        def pick(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(rules.used.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        own = jax.tree.map(pick, again, own)
        return tokens, own, kept.at[batch.slot].set(tokens, mode="drop")

    def _logprobs(self, logits: jax.Array, tokens: jax.Array, listed: int) -> Logprobs:
        return Logprobs(*log_probabilities(logits, tokens, listed, self.drawable))

    def _following(self, logits: jax.Array, ids: jax.Array) -> jax.Array:
        """Log-probabilities float32 [B, MAX_NEXT] of tokens int32 [B, MAX_NEXT] under the logits
        [B, V] behind the prompts (`Sampled.logits`)."""
        assert ids.shape[1] == MAX_NEXT
        logits = logits.astype(jnp.float32)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.take_along_axis(logits, ids, axis=-1) - total

    def _choose(
        self, logits: jax.Array, batch: StepBatch, min_p: jax.Array | None = None
    ) -> jax.Array:
        return sample_rows(
            drawable_logits(logits, self.drawable),
            batch.seed,
            step=batch.numbers[:, 3],
            temperature=batch.levels[:, 0],
            top_p=batch.levels[:, 1],
            top_k=batch.numbers[:, 4],
            min_p=min_p,
        )

    def _swap_out(self, cache: Cache, slot: jax.Array, pages: jax.Array) -> Any:
        """A sequence's state: (pages [layers, n, page, r + p], tails). pages int32 [n]: entries
        after the sequence's own may be any number."""
        tails = jax.tree.map(lambda t: t[slot], cache.tails)
        return cache.pool.at[:, pages].get(mode="clip"), tails

    def _fresh_kept(self, weights: Weights) -> Any:
        """The tails behind kept beginnings of prompts: as Cache.tails, [units, L, M, d]."""
        model = self._model(weights)
        return {k: m.init_tail(self.units, model.dtype) for k, m in model.engrams.items()}

    def _keep(self, kept: Any, cache: Cache, slots: jax.Array, rows: jax.Array) -> Any:
        """Store the tails of `slots` in `rows` of the kept ones. int32 [n] both; rows out of range
        are dropped."""

        def store(all_: jax.Array, tails: jax.Array) -> jax.Array:
            return all_.at[rows].set(tails.at[slots].get(mode="clip"), mode="drop")

        return jax.tree.map(store, kept, cache.tails)

    def _restore(self, cache: Cache, kept: Any, slots: jax.Array, rows: jax.Array) -> Cache:
        """The inverse; slots out of range are dropped."""

        def load(all_: jax.Array, kept: jax.Array) -> jax.Array:
            return all_.at[slots].set(kept.at[rows].get(mode="clip"), mode="drop")

        return replace(cache, tails=jax.tree.map(load, cache.tails, kept))

    def _swap_in(
        self, cache: Cache, slot: jax.Array, pages: jax.Array, state: Any, token: jax.Array
    ) -> Cache:
        """The inverse; entries after the sequence's own pages are out of range, and dropped."""
        kept, tails = state
        return Cache(
            cache.pool.at[:, pages].set(kept, mode="drop"),
            jax.tree.map(lambda all_, one: all_.at[slot].set(one), cache.tails, tails),
            cache.tokens.at[slot].set(token),
        )
