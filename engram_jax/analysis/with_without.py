"""One text read by a model with its memory and without: where rows lie, gates, the next token.

Both are one pass of the network over two copies of the text. In the second no token gets any
memory, which is the model with its Engram layers switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.analysis.memory_reading import run_document
from engram_jax.config import ServeConfig
from engram_jax.model.program import Program, Weights
from engram_jax.sharding.rules import P

MOST = 1 << 23  # logits computed at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WithWithout:
    """A text of T tokens, the beginning of a document.

    addresses: layer id -> int32 [T, H], the rows that a token reads (of layers that are off, too);
      norms: float32 [T, H], theirs. gates: layer id -> float32 [T, M], of the layers that have any.
    candidates: int32 [T, 2 k], after each token the k likeliest next ones with memory, then the k
      likeliest without. log_with, log_without: float32 [T, 2 k], their log-probabilities, nats.
    divergence: float32 [T], KL(with || without) of the next token's distribution, nats.
    next_with, next_without: float32 [T], log-probabilities of the token that does come next; of the
      last one, of token 0.
    """

    addresses: dict[str, Any]
    norms: dict[str, Any]
    gates: dict[str, Any]
    candidates: Any
    log_with: Any
    log_without: Any
    divergence: Any
    next_with: Any
    next_without: Any


def jit_with_without(program: Program, off: ServeConfig, top: int) -> jax.stages.Wrapped:
    """(weights, tokens int32 [T]) -> `WithWithout`, compiled. off: layers and orders that are off
    on both sides. top: k, at most the vocabulary. Tokens behind a text change nothing before them:
    it may be padded."""
    vocab = program.config.tokenizer.vocab_size
    top = min(top, vocab)

    def read(weights: Weights, tokens: jax.Array) -> WithWithout:
        both = jnp.stack([tokens, tokens])
        with_memory = jnp.array([True, False])
        addresses, rows, output = run_document(program, weights, both, off, remembers=with_memory)
        model = program.model(weights.params, weights.router_bias)

        def at(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            with_, without = (jax.nn.log_softmax(model.logits(hidden)) for hidden in inputs[:2])
            ids = jnp.concatenate([jax.lax.top_k(x, top)[1] for x in (with_, without)])
            divergence = jnp.sum(jnp.exp(with_) * (with_ - without))
            coming = inputs[2]
            return ids, with_[ids], without[ids], divergence, with_[coming], without[coming]

        coming = jnp.append(tokens[1:], 0)
        found = jax.lax.map(at, (*output.hidden, coming), batch_size=max(1, MOST // vocab))
        norms = {
            layer: jnp.linalg.norm(x[0].astype(jnp.float32), axis=-1) for layer, x in rows.items()
        }
        gates = {layer: gate[0] for layer, gate in output.gates.items()}
        return WithWithout({k: a[0] for k, a in addresses.items()}, norms, gates, *found)

    return program.jit(read, out_shardings=NamedSharding(program.mesh, P()))


def of_text(found: WithWithout, length: int) -> WithWithout:
    """The first `length` tokens, as NumPy arrays."""
    found = jax.device_get(found)
    return jax.tree.map(lambda x: np.asarray(x)[:length], found)
