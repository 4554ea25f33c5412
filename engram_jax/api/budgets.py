"""Equal budgets: parameters and FLOPs of a configuration, and the sizes that reach another's."""

from __future__ import annotations

from engram_jax.api.models import Source, configure
from engram_jax.config import Config
from engram_jax.model import budgets
from engram_jax.model.budgets import MATCHED, Budget


def budget(config: Source) -> Budget:
    """The budget of a configuration by the paper's definitions (section 3), nothing allocated:
    `total` (P_tot), `active` (P_act), `sparse` (their difference) and `rho`, the routed experts'
    share of it, all without vocabulary embedding and head; `flops`, training FLOPs per token.
    `mismatch` compares two.

    config: as for `configure`.

    Example: `budget("configs/engram27b.py").mismatch(budget("configs/moe27b.py"))`.
    """
    return budgets.budget_of(configure(config))


def solve(base: Source, variant: Source, rho: float | None = None, rule: str = MATCHED) -> Config:
    """`variant` with the sizes that give it the budget of `base`: the routed experts that make
    their share of the sparse parameters nearest to `rho`, and the rows per head that fill P_tot.

    base, variant: as for `configure`; the variant has Engram layers. rho: None keeps the variant's
      experts. rule: "matched" also sets the dense layers' width (model.ffn.dense_dim), so that
      P_act and FLOPs are the base's; "paper" lets them become what they become.

    Raises UserError for a rho that these sizes cannot have, with the possible range.

    Example: `solve("configs/moe_tiny.py", "configs/engram_tiny.py", rho=0.7)`.
    """
    return budgets.solve(configure(base), configure(variant), rho, rule)
