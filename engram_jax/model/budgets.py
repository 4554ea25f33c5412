"""Solves a model's size for a budget: the sparsity allocation of the paper (section 3).

P_tot and P_act are the paper's: all parameters, and those that a token is multiplied with, both
without the vocabulary embedding and the output head. P_sparse = P_tot - P_act, and rho is the
routed experts' share of it. Fixed P_tot and P_act, rho decides how many routed experts give way to
rows of the tables.

Nothing is allocated: figures come from model/describe.py's counts, table sizes from the primes that
addressing/hash_plan.py chooses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engram_jax.config import Config, ModelConfig, TokenizerConfig, TrainConfig
from engram_jax.config.errors import UserError
from engram_jax.model import describe

PAPER, MATCHED = "paper", "matched"
RULES = (PAPER, MATCHED)
ROWS = "model.engram.rows_per_head"
_SMALLEST = 2  # rows of a head, keys of a product-key memory
_LARGEST = 1 << 30
_TURNS = 8  # two suffice unless the memory's active parameters depend on its size


@dataclass(frozen=True)
class Budget:
    """Parameters by the paper's definitions, without vocabulary embedding and head.

    total: P_tot. active: P_act. idle_experts: parameters of the routed experts that a token does
    not use. flops: training FLOPs per token of the whole model, head included.
    """

    total: int
    active: int
    idle_experts: int
    flops: float

    @property
    def sparse(self) -> int:
        """P_sparse."""
        return self.total - self.active

    @property
    def rho(self) -> float | None:
        """Routed experts' share of P_sparse; None of a model without sparse parameters."""
        return self.idle_experts / self.sparse if self.sparse else None

    def mismatch(self, base: Budget) -> dict[str, float]:
        """Relative differences to `base`, by figure: 0.01 is 1 % more."""
        return {
            "total": self.total / base.total - 1,
            "active": self.active / base.active - 1,
            "flops": self.flops / base.flops - 1,
        }


@dataclass(frozen=True)
class Tolerance:
    """Largest relative mismatch that a solution may have, by figure; None: it is only reported."""

    total: float
    active: float | None
    flops: float | None


TOLERANCES = {PAPER: Tolerance(1e-3, None, None), MATCHED: Tolerance(1e-3, 1e-3, 5e-3)}


def budget_of(config: Config) -> Budget:
    """The budget of a configuration."""
    counts = dict(_parts(_without_rows(config.model), config.tokenizer))
    active = describe.active_params(config, counts)
    vocabulary = counts["token embedding"] + counts.get("output head", 0)
    return Budget(
        total=sum(counts.values()) - vocabulary + describe.table_params(config),
        active=active - counts.get("output head", 0),
        idle_experts=describe.idle_experts(config, counts),
        flops=describe.training_flops(config, counts),
    )


def solve(
    base: Config,
    variant: Config,
    rho: float | None = None,
    rule: str = MATCHED,
    *,
    size: str = ROWS,
    step: int = 1,
    tolerance: Tolerance | None = None,
) -> Config:
    """`variant` with the sizes that give it the budget of `base`.

    base: whose P_tot, P_act and FLOPs per token are to be reached.
    variant: everything but the solved sizes; it has a memory (Engram layers, or what `size` names).
    rho: the share of P_sparse that routed experts are to have. Experts are whole, so the nearest
      possible share is taken (`budget_of(...).rho` says which). None: the variant's experts stay.
    rule: "paper" varies routed experts and `size` only, so that P_tot is the base's; "matched"
      lets the dense layers' width compensate what the memory's projections cost, so that P_act and
      FLOPs are, too.
    size: key of the whole number that fills P_tot, the memory's: a multiple of `step`.
    tolerance: largest mismatch, default TOLERANCES[rule].

    Raises UserError for a rho that these sizes cannot have, with the possible range, and for a
    mismatch that is larger than the tolerance.
    """
    if rule not in RULES:
        raise UserError(f"rule = {rule!r}: must be one of {', '.join(RULES)}")
    target = budget_of(base)
    if rho is not None:
        experts = _experts(variant, target, rho, rule, size)
        variant = _with(variant, "model.ffn.routed_experts", experts)
    filled = _filled(variant, target, rule, size, step)
    if filled is None:
        raise UserError(_no_room(variant, target, rule, size))
    _check(budget_of(filled), target, tolerance or TOLERANCES[rule], filled.name)
    return filled


def solve_width(base: Config, variant: Config, figure: str = "active") -> Config:
    """`variant` with the width of its dense layers that gives it the P_act ("active") or the P_tot
    ("total") of `base`, within 0.1 %: for models without a memory to fill."""
    target = getattr(budget_of(base), figure)
    width = _width(variant, target, figure)
    if width is None:
        raise UserError(f"{variant.name}: no width of its dense layers gives {target:,} parameters")
    solved = _with(variant, "model.ffn.dense_dim", width)
    off = getattr(budget_of(solved), figure) / target - 1
    if abs(off) > 1e-3:
        raise UserError(f"{variant.name}: {figure} parameters would be {off:+.2%} off the base's")
    return solved


def table(budget: Budget, base: Budget | None = None) -> str:
    """The budget as text for a terminal, with its mismatch to `base`."""
    off = budget.mismatch(base) if base else {}
    lines = ["by the paper's definitions (without vocabulary embedding and head)"]
    figures = (
        ("P_tot", f"{budget.total:,}", "total"),
        ("P_act", f"{budget.active:,}", "active"),
        ("P_sparse = P_tot - P_act", f"{budget.sparse:,}", ""),
        ("training FLOPs per token", f"{budget.flops:.6g}", "flops"),
    )
    for name, value, figure in figures:
        against = f"{off[figure]:>+9.2%} against the base" if figure in off else ""
        lines.append(f"{name:34}{value:>18}{against}")
    return "\n".join(lines)


def as_dict(budget: Budget, base: Budget | None = None) -> dict[str, Any]:
    """The same as JSON-able values."""
    found: dict[str, Any] = {
        "P_tot": budget.total,
        "P_act": budget.active,
        "P_sparse": budget.sparse,
        "rho": budget.rho,
        "flops_per_token": budget.flops,
    }
    return {**found, "mismatch": budget.mismatch(base)} if base else found


def _experts(variant: Config, target: Budget, rho: float, rule: str, size: str) -> int:
    """The number of routed experts whose share is nearest to rho, which the rest has room for."""
    top_k = variant.model.ffn.top_k
    if variant.model.ffn.routed_experts == 0:
        raise UserError(f"rho = {rho:g}: {variant.name} has no routed experts to vary")
    one = _per_step(variant, "model.ffn.routed_experts", lambda b: b.idle_experts)
    wanted = top_k + round(rho * target.sparse / one)
    possible = range(top_k, top_k + round(target.sparse / one) + 1)
    fits = [e for e in possible if _has_room(variant, e, target, rule, size)]
    if not fits:
        raise UserError(_no_room(variant, target, rule, size))
    if not 0 <= rho <= 1 or wanted not in fits:
        low, high = ((e - top_k) * one / target.sparse for e in (fits[0], fits[-1]))
        raise UserError(
            f"rho = {rho:g}: must be from {low:.3f} to {high:.3f} ({fits[0]} to {fits[-1]} routed"
            f" experts) with the memory of {variant.name}, or 1, which is the base without memory"
        )
    return wanted


def _has_room(variant: Config, experts: int, target: Budget, rule: str, size: str) -> bool:
    """Whether a memory of the smallest size fits beside so many experts (linear in all of them)."""
    smallest = _with(variant, size, _SMALLEST)
    now = budget_of(smallest)
    more = experts - variant.model.ffn.routed_experts
    key = "model.ffn.routed_experts"
    total = now.total + more * _per_step(smallest, key, lambda b: b.total)
    active = now.active + more * _per_step(smallest, key, lambda b: b.active)
    if rule == MATCHED:
        one = _per_step(smallest, "model.ffn.dense_dim", lambda b: b.active)
        if one == 0:
            return False
        wider = round((target.active - active) / one)
        if variant.model.ffn.dense_dim + wider < 1:
            return False
        total += wider * one
    return total <= target.total


def _filled(variant: Config, target: Budget, rule: str, size: str, step: int) -> Config | None:
    """The variant with width (rule "matched") and memory filled up; None if there is no room.

    Each is solved with the other as it is, in turn: the active parameters of some memories grow
    with their size, of product keys for one.
    """
    for _ in range(_TURNS):
        before = variant
        if rule == MATCHED:
            width = _width(variant, target.active, "active")
            if width is None:
                return None
            variant = _with(variant, "model.ffn.dense_dim", width)
        nearest = _nearest(variant, target.total, size, step)
        if nearest is None:
            return None
        variant = _with(variant, size, nearest)
        if variant == before:
            break
    return variant


def _nearest(variant: Config, target: int, size: str, step: int) -> int | None:
    """The multiple of `step` that brings P_tot nearest to `target`; None if there is no room."""

    def total(multiple: int) -> int:
        return budget_of(_with(variant, size, multiple * step)).total

    low = -(-_SMALLEST // step)
    if total(low) > target:
        return None
    high = 2 * low  # total(low) <= target < total(high)
    while total(high) <= target:
        low, high = high, 2 * high
        if high * step > _LARGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= target else (low, middle)
    return step * min((low, high), key=lambda multiple: abs(total(multiple) - target))


def _width(variant: Config, target: int, figure: str) -> int | None:
    """The width of the dense layers that comes nearest; None if there is none."""
    one = _per_step(variant, "model.ffn.dense_dim", lambda b: getattr(b, figure))
    if one == 0:
        return None
    missing = target - getattr(budget_of(variant), figure)
    width = variant.model.ffn.dense_dim + round(missing / one)
    return width if width >= 1 else None


def _no_room(variant: Config, target: Budget, rule: str, size: str) -> str:
    """Why no size fits, in a line."""
    ffn, name = variant.model.ffn, variant.name
    budget = f"P_tot {target.total:,} and P_act {target.active:,}"
    if rule == MATCHED and ffn.routed_experts and ffn.dense_layers == 0:
        return f"{name}: rule {MATCHED!r} needs a dense layer (model.ffn.dense_layers = 0)"
    if rule == MATCHED and _width(variant, target.active, "active") is None:
        return f"{name}: its active parameters alone are more than {budget} allow, at any width"
    return f"{name}: no {size} of {_SMALLEST} to {_LARGEST} gives it {budget}"


def _check(found: Budget, target: Budget, tolerance: Tolerance, name: str) -> None:
    for figure, off in found.mismatch(target).items():
        most = getattr(tolerance, figure)
        if most is not None and abs(off) > most:
            raise UserError(
                f"{name}: the nearest sizes give {off:+.3%} of {figure} against the base; at most"
                f" {most:.1%} are allowed"
            )


def _per_step(config: Config, key: str, figure: Callable[[Budget], int]) -> int:
    """What a figure grows by when the experts or the dense width grow by one. It is linear in both,
    so the step is taken where every call of one geometry takes it: a trace serves them all."""
    ffn = config.model.ffn
    smallest = {"model.ffn.dense_dim": 1, "model.ffn.routed_experts": ffn.top_k}
    if ffn.routed_experts == 0:
        del smallest["model.ffn.routed_experts"]
    for name, value in smallest.items():
        config = _with(config, name, value)
    return figure(budget_of(_with(config, key, smallest[key] + 1))) - figure(budget_of(config))


def _with(config: Config, key: str, value: int) -> Config:
    """The configuration with another whole number at a dotted key (a list of one where it is a
    list)."""

    def replaced(section: Any, names: list[str]) -> Any:
        name, *rest = names
        old = getattr(section, name)
        new: Any = replaced(old, rest) if rest else (value,) if isinstance(old, tuple) else value
        return dataclasses.replace(section, **{name: new})

    changed: Config = replaced(config, key.split("."))
    return changed


def _without_rows(model: ModelConfig) -> ModelConfig:
    """Tables are counted from their primes: the parameters do not depend on the rows."""
    engram = dataclasses.replace(model.engram, rows_per_head=(_SMALLEST,))
    return dataclasses.replace(model, engram=engram)


@functools.lru_cache(maxsize=256)
def _parts(model: ModelConfig, tokenizer: TokenizerConfig) -> tuple[tuple[str, int], ...]:
    """Parameters by part, without the tables; traced once for each model."""
    config = Config(model=model, tokenizer=tokenizer, train=TrainConfig())
    return tuple(describe.parts(config).items())
