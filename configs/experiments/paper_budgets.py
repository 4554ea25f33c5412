"""The two budgets of the paper's sparsity allocation (section 3), at a geometry of ours.

    python launch.py --config=configs/experiments/paper_budgets.py:budget=6e20,rho=0.78 \\
        --mode=describe --base=configs/experiments/paper_budgets.py:budget=6e20

The paper prints P_tot, P_act and the routed experts at rho = 1 of each budget: 5.7 B, 568 M and 106
for 2e20 training FLOPs, 9.9 B, 993 M and 99 for 6e20. Layers, widths and heads are not printed;
those here give the three figures within 0.5 %, with the form of the paper's 27 B models: two shared
and six active experts, a dense first layer eight experts wide, MLA with heads of 128. Without rho
(or with rho=1) it is the pure MoE; below 1, rule "matched" exchanges experts for rows. Hardware and
training as configs/dense4b.py. Not trained by us.
"""

import dataclasses

import ml_collections

from configs import engram27b, moe27b
from engram_jax.config import parse_config, to_dict
from engram_jax.config.errors import UserError
from engram_jax.model import budgets

# layers, d_model, heads, expert_dim, dense_dim, routed experts at rho = 1
GEOMETRIES = {
    "2e20": (12, 1280, 16, 1216, 9728, 106),
    "6e20": (16, 1664, 14, 1280, 10240, 99),
}


def get_config(argument: str = "budget=2e20") -> ml_collections.ConfigDict:
    """argument: "budget=2e20" or "budget=6e20", with ",rho=SHARE" for an Engram model."""
    given = dict(item.partition("=")[::2] for item in argument.split(","))
    budget, rho = given.get("budget", ""), given.get("rho", "1")
    if set(given) - {"budget", "rho"} or budget not in GEOMETRIES:
        raise UserError(f"{argument}: must be budget=2e20 or budget=6e20, and rho=SHARE if wanted")
    base = _sized(moe27b.get_config(), budget)
    if float(rho) == 1:
        return base
    variant = _sized(engram27b.get_config(), budget)
    variant.name = f"paper_budget_{budget}_rho_{rho}"
    variant.model.engram.layers = (1, base.model.layers // 2 - 1)
    solved = budgets.solve(parse_config(base), parse_config(variant), float(rho))
    return ml_collections.ConfigDict(to_dict(dataclasses.replace(solved, name=variant.name)))


def _sized(config: ml_collections.ConfigDict, budget: str) -> ml_collections.ConfigDict:
    layers, d_model, heads, expert_dim, dense_dim, experts = GEOMETRIES[budget]
    config.name = f"paper_budget_{budget}"
    model = config.model
    model.layers, model.d_model, model.attention.heads = layers, d_model, heads
    model.ffn.expert_dim, model.ffn.dense_dim = expert_dim, dense_dim
    model.ffn.routed_experts = experts
    return config
