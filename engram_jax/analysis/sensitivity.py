"""What the loss owes to which part of the memory: parts are switched off, one at a time.

A layer that is off adds nothing (as config.serve.off_layers; in form "over_encoding", where the
rows are averaged into the input, they are zero); a head, an order or a band of frequencies that is
off has its rows read as zero. Nothing is trained again, as in the paper's
sensitivity analysis: a model that never had the part would have learnt to do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.addressing.hash_numpy import canonicalise, lookback
from engram_jax.analysis.depth import Variables
from engram_jax.analysis.usage import BANDS, NgramCounts, band_name
from engram_jax.config import OVER_ENCODING
from engram_jax.data.packing import Batch
from engram_jax.data.placement import place_batch
from engram_jax.model.program import Program
from engram_jax.training.step import batch_addresses, fetch_rows, score_rows


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
    token's rows were changed, and their nats with the part off and with all on. sequences: how many
    have targets; squares: sums over them of d², d n and n², d the rise in nats over n targets."""

    part: Part
    targets: int = 0
    nats: float = 0.0
    base: float = 0.0
    affected: int = 0
    affected_nats: float = 0.0
    affected_base: float = 0.0
    sequences: int = 0
    squares: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(self, changed: np.ndarray, base: np.ndarray, real: np.ndarray, hit: np.ndarray) -> None:
        """A batch: nats with the part off and on, 0 where there is no target; which are targets,
        and which of them are affected. All [B, T]."""
        self.targets += int(real.sum())
        self.nats += float(changed.sum())
        self.base += float(base.sum())
        self.affected += int(hit.sum())
        self.affected_nats += float(changed[hit].sum())
        self.affected_base += float(base[hit].sum())
        rises, counts = (changed - base).sum(axis=1), real.sum(axis=1)
        self.sequences += int((counts > 0).sum())
        self.squares += [rises @ rises, rises @ counts, counts @ counts]

    @property
    def error(self) -> float:
        """The standard error of `rise`, sequences being what is drawn; NaN of one."""
        if self.sequences < 2:
            return float("nan")
        rises, both, counts = self.squares
        squares = max(0.0, rises - 2 * self.rise * both + self.rise**2 * counts)
        return float(np.sqrt(squares * self.sequences / (self.sequences - 1)) / self.targets)

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
            name = f"{order}-grams {band_name(low, high)} in training"
            parts.append(Part(name, layers, heads, (order, low, high)))
    for layer in layers:
        for head in range(engram.heads):
            order = engram.orders[head // each]
            name = f"layer {layer}, head {head % each} of the {order}-grams"
            parts.append(Part(name, (layer,), (head,)))
    return parts


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


class _Losses:
    """The losses of a batch's targets with some rows off, float64 [B, T]."""

    def __init__(self, program: Program, variables: Variables):
        self._program, self._variables = program, variables
        self._nats = jit_nats(program)

    def __call__(self, batch: Batch, off: Mapping[str, Any]) -> np.ndarray:
        mesh, size = self._program.mesh, self._program.config.data.batch_size
        placed = place_batch(mesh, batch, size), place_batch(mesh, dict(off), size)
        return np.asarray(jax.device_get(self._nats(*self._variables, *placed)), np.float64)


def sensitivity(
    program: Program,
    variables: Variables,
    batches: Iterable[Batch],
    parts: Sequence[Part],
    ngrams: Mapping[int, NgramCounts],
) -> list[Effect]:
    """The effect of every part over batches.

    variables: parameters, router bias and tables of a training state. ngrams: of the training text
    by order, for the bands.
    """
    losses, effects = _Losses(program, variables), [Effect(part) for part in parts]
    nothing = Part("nothing", (), ())
    for batch in batches:
        counts = counts_at(program, batch, ngrams)
        real = batch["loss_mask"] > 0
        base = losses(batch, rows_off(program, nothing, batch, counts)[0])
        for effect in effects:
            off, where = rows_off(program, effect.part, batch, counts)
            changed = losses(batch, off) if where.any() else base
            effect.add(changed, base, real, real & where)
    return effects


@dataclass
class BandLoss:
    """Targets whose token's n-gram of an order was `low` to `high` - 1 times in training, and their
    nats with the memory on and with all of it off."""

    order: int
    low: int
    high: float
    targets: int = 0
    nats: float = 0.0
    off_nats: float = 0.0

    @property
    def name(self) -> str:
        return band_name(self.low, self.high)


def losses_by_frequency(
    program: Program,
    variables: Variables,
    batches: Iterable[Batch],
    ngrams: Mapping[int, NgramCounts],
) -> list[BandLoss]:
    """The losses of targets by how often the n-gram before them was in training, hot or cold, for
    every order and band of `BANDS`. The n-gram is the one that ends at the token which predicts the
    target, in canonical ids: the one whose rows are read there. Arguments as of `sensitivity`."""
    losses = _Losses(program, variables)
    layers = program.config.model.engram.layers
    nothing, everything = Part("nothing", (), ()), Part("all layers", layers)
    highs = (*BANDS[1:], np.inf)
    found = [BandLoss(n, a, b) for n in ngrams for a, b in zip(BANDS, highs, strict=True)]
    for batch in batches:
        counts = counts_at(program, batch, ngrams)
        on, off = (
            losses(batch, rows_off(program, part, batch, counts)[0])
            for part in (nothing, everything)
        )
        for band in found:
            count = counts[band.order]
            hit = (batch["loss_mask"] > 0) & (count >= band.low) & (count < band.high)
            band.targets += int(hit.sum())
            band.nats += float(on[hit].sum())
            band.off_nats += float(off[hit].sum())
    return found


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


def rows_off(
    program: Program, part: Part, batch: Mapping[str, Any], counts: Mapping[int, np.ndarray]
) -> tuple[dict[str, Any], np.ndarray]:
    """(what `jit_nats` takes, of all layers; bool [B, T] the tokens that it changes). counts: of
    `counts_at`."""
    engram, where = program.config.model.engram, batch["segments"] > 0
    if part.band is not None:
        order, low, high = part.band
        where = where & (counts[order] >= low) & (counts[order] < high)
    heads = np.zeros(engram.heads, bool)
    heads[slice(None) if part.heads is None else list(part.heads)] = True
    off: dict[str, Any] = {}
    # One form for all parts but whole layers: what is compiled depends on which layers are None.
    for layer in engram.layers:
        mine = layer in part.layers
        whole = mine and part.heads is None and engram.form != OVER_ENCODING
        off[str(layer)] = None if whole else where[..., None] & heads & mine
    return off, where
