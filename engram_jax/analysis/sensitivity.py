"""What the loss owes to which part of the memory: parts are switched off, one at a time.

A layer that is off adds nothing (as config.serve.off_layers); a head, an order or a band of
frequencies that is off has its rows read as zero. Nothing is trained again, as in the paper's
sensitivity analysis: a model that never had the part would have learnt to do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.addressing.hash_numpy import canonicalise, lookback
from engram_jax.analysis.usage import NgramCounts
from engram_jax.data.packing import Batch
from engram_jax.data.placement import place_batch
from engram_jax.model.program import Program
from engram_jax.training.state import TrainState
from engram_jax.training.step import batch_addresses, fetch_rows, score_rows

BANDS = (0, 1, 2, 4, 16, 64, 256)  # lowest counts in training of the bands of n-grams


@dataclass(frozen=True)
class Part:
    """What is switched off: a layer, or heads of layers, at all tokens or where `band` says.

    layers: the ids. heads: indices of a layer's heads whose rows are zero; None = the layer adds
    nothing. band: (order, lowest count, count behind the highest): only at tokens whose n-gram of
    that order was so often in training.
    """

    name: str
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    band: tuple[int, int, float] | None = None


@dataclass
class Effect:
    """Sums over targets. nats: with the part off. base: with all on. affected: targets whose
    token's rows were changed, and their nats with the part off and with all on."""

    part: Part
    targets: int = 0
    nats: float = 0.0
    base: float = 0.0
    affected: int = 0
    affected_nats: float = 0.0
    affected_base: float = 0.0

    @property
    def rise(self) -> float:
        """Nats per target that the loss rises by."""
        return (self.nats - self.base) / self.targets if self.targets else float("nan")

    @property
    def rise_where_affected(self) -> float:
        """The same over the targets whose token's rows were changed; NaN without any."""
        change = self.affected_nats - self.affected_base
        return change / self.affected if self.affected else float("nan")


def parts_of(program: Program) -> list[Part]:
    """All layers together and each; every order over all layers; every head of every layer; bands
    of frequencies of every order over all layers."""
    engram = program.config.model.engram
    layers, each = engram.layers, engram.heads_per_order
    if not layers:
        return []
    parts = [Part("all layers", layers), *(Part(f"layer {k}", (k,)) for k in layers)]
    for i, order in enumerate(engram.orders):
        heads = tuple(range(i * each, (i + 1) * each))
        parts.append(Part(f"{order}-grams", layers, heads))
        for low, high in zip(BANDS, (*BANDS[1:], np.inf), strict=True):
            name = f"{order}-grams {_band(low, high)} in training"
            parts.append(Part(name, layers, heads, (order, low, high)))
    for layer in layers:
        for head in range(engram.heads):
            order = engram.orders[head // each]
            name = f"layer {layer}, head {head % each} of the {order}-grams"
            parts.append(Part(name, (layer,), (head,)))
    return parts


def _band(low: int, high: float) -> str:
    if high == low + 1:
        return "never" if low == 0 else "once" if low == 1 else f"{low} times"
    return f"{low} times and more" if high == np.inf else f"{low} to {int(high) - 1} times"


def jit_nats(program: Program) -> jax.stages.Wrapped:
    """(params, router bias, memory, batch, off) -> float32 [B, T], the loss of every target, 0
    where there is none, compiled. off: layer id -> bool [B, T, H], rows that are read as zero, or
    None, a layer that adds nothing; layers that are not in it read everything."""

    def run(params: Any, bias: Any, memory: Any, batch: Any, off: Any) -> jax.Array:
        rows: Any = fetch_rows(program, memory, batch_addresses(program, batch))[0]
        for layer, mask in off.items():
            rows[layer] = None if mask is None else jnp.where(mask[..., None], 0, rows[layer])
        return score_rows(program, params, rows, bias, batch)[0]

    return program.jit(run)


def sensitivity(
    program: Program,
    state: TrainState,
    batches: Iterable[Batch],
    parts: Sequence[Part],
    ngrams: Mapping[int, NgramCounts],
) -> list[Effect]:
    """The effect of every part over batches (this process's rows of each).

    ngrams: of the training text by order, for the bands.
    """
    nats, effects = jit_nats(program), [Effect(part) for part in parts]
    size = program.config.data.batch_size

    def loss(batch: Any, off: dict[str, Any]) -> np.ndarray:
        given = place_batch(program.mesh, batch, size), place_batch(program.mesh, off, size)
        found = nats(state.params, state.router_bias, state.memory, *given)
        return np.asarray(jax.device_get(found), np.float64)

    for batch in batches:
        base, real = loss(batch, {}), batch["loss_mask"] > 0
        counts = counts_at(program, batch, ngrams)
        for effect in effects:
            off, where = _off(program, effect.part, batch, counts)
            changed = loss(batch, off) if where.any() else base
            effect.targets += int(real.sum())
            effect.nats += float(changed.sum())
            effect.base += float(base.sum())
            hit = real & where
            effect.affected += int(hit.sum())
            effect.affected_nats += float(changed[hit].sum())
            effect.affected_base += float(base[hit].sum())
    return effects


def counts_at(
    program: Program, batch: Batch, ngrams: Mapping[int, NgramCounts]
) -> dict[int, np.ndarray]:
    """How often the n-gram of every token was in training: order -> int64 [B, T]."""
    addressing = program.addressing
    if addressing is None or not ngrams:
        return {}
    layer = next(iter(addressing.layers.values()))
    canonical = canonicalise(batch["tokens"], addressing.compression)
    back = lookback(canonical, layer, batch["segments"])
    return {n: known.of(np.stack(back[:n][::-1], axis=-1)) for n, known in ngrams.items()}


def _off(
    program: Program, part: Part, batch: Batch, counts: Mapping[int, np.ndarray]
) -> tuple[dict[str, Any], np.ndarray]:
    """(what `jit_nats` takes, bool [B, T] the tokens that it changes)."""
    where = batch["segments"] > 0
    if part.heads is None:
        return {str(layer): None for layer in part.layers}, where
    if part.band is not None:
        order, low, high = part.band
        where = where & (counts[order] >= low) & (counts[order] < high)
    heads = np.zeros(program.config.model.engram.heads, bool)
    heads[list(part.heads)] = True
    return {str(layer): where[..., None] & heads for layer in part.layers}, where
