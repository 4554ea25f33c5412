"""Which parts of Engram matter: one switch at a time, at one budget, at the demo's size.

    python launch.py --mode=sweep --config=configs/experiments/components.py
    python launch.py --config=configs/experiments/components.py:variant=layer_1,seed=1

The budget is configs/moe_tiny.py's. The reference, variant=engram, has the experts of rho = 0.7 in
it. Every other line of VARIANTS is the reference with the keys that it names, and with a rule for
what they cost or save. 400 steps of 16 x 128 tokens, about 5 minutes a run on 2 cores.
"""

import dataclasses

import ml_collections

from configs import engram_tiny, moe_tiny
from configs.experiments import allocation
from engram_jax.config import parse_config, to_dict
from engram_jax.lab.experiment import Experiment, Point
from engram_jax.model import budgets

RHO = 0.7
RATES = (4e-3, 8e-3, 16e-3)
MATCHED = "matched"  # rows and the dense layer's width give it P_tot and P_act
SAME = "same"  # the reference's sizes: what the switch adds or removes is not made up for
ACTIVE, TOTAL = "active", "total"  # the dense layers' width gives it P_act, or P_tot
MOE, ENGRAM, DENSE, DENSE_ENGRAM = "MoE", "Engram", "dense", "dense with Engram"  # families
SCONE, PRODUCT_KEYS = "SCONE", "product keys"
OVER_ENCODING = "OverEncoding"

_NO_EXPERTS = {"model.ffn.routed_experts": 0, "model.ffn.dense_layers": 4}
_NO_MEMORY = {"model.engram.layers": ()}
_ENGRAM = "model.engram"
_KEYS = "model.product_keys"
_PRODUCT_KEYS = {**_NO_MEMORY, f"{_KEYS}.layers": (1,)}

# name: (family, rule, keys that differ from the reference)
VARIANTS = {
    "engram": (ENGRAM, MATCHED, {}),
    "moe": (MOE, ACTIVE, {**_NO_MEMORY, "model.ffn.routed_experts": 22}),
    "dense": (DENSE, ACTIVE, {**_NO_MEMORY, **_NO_EXPERTS}),
    "dense_total": (DENSE, TOTAL, {**_NO_MEMORY, **_NO_EXPERTS}),
    "dense_engram": (DENSE_ENGRAM, MATCHED, _NO_EXPERTS),
    "four_grams": (ENGRAM, MATCHED, {f"{_ENGRAM}.orders": (2, 3, 4), f"{_ENGRAM}.d_mem": 192}),
    "bigrams": (ENGRAM, MATCHED, {f"{_ENGRAM}.orders": (2,)}),
    "layer_0": (ENGRAM, MATCHED, {f"{_ENGRAM}.layers": (0,)}),
    "layer_1": (ENGRAM, MATCHED, {f"{_ENGRAM}.layers": (1,)}),
    "layer_2": (ENGRAM, MATCHED, {f"{_ENGRAM}.layers": (2,)}),
    "layer_3": (ENGRAM, MATCHED, {f"{_ENGRAM}.layers": (3,)}),
    "layers_1_2_3": (ENGRAM, MATCHED, {f"{_ENGRAM}.layers": (1, 2, 3)}),
    "no_bias_no_conv": (ENGRAM, MATCHED, {f"{_ENGRAM}.form": "v41"}),
    "dense_adam": (ENGRAM, SAME, {"optimizer.memory_optimizer": "dense_adam"}),
    "gate_one": (ENGRAM, MATCHED, {f"{_ENGRAM}.gate": "one"}),
    "gate_learned": (ENGRAM, MATCHED, {f"{_ENGRAM}.gate": "learned"}),
    "single_branch": (ENGRAM, MATCHED, {f"{_ENGRAM}.multi_branch": False}),
    "no_conv": (ENGRAM, MATCHED, {f"{_ENGRAM}.conv_kernel": 0}),
    "no_compression": (ENGRAM, SAME, {f"{_ENGRAM}.compression": False}),
    "case": (ENGRAM, MATCHED, {f"{_ENGRAM}.case": True}),
    "signs": (ENGRAM, SAME, {f"{_ENGRAM}.signs": True}),
    "one_row": (ENGRAM, SAME, {f"{_ENGRAM}.lookup": "one_row"}),
    "shuffled": (ENGRAM, SAME, {f"{_ENGRAM}.lookup": "shuffled"}),
    "frozen": (ENGRAM, SAME, {"optimizer.memory_optimizer": "frozen"}),
    "over_encoding": (
        OVER_ENCODING,
        MATCHED,
        {f"{_ENGRAM}.form": "over_encoding", f"{_ENGRAM}.layers": (0,)},
    ),
    **{
        f"over_encoding_rate_{rate}": (
            OVER_ENCODING,
            MATCHED,
            {
                f"{_ENGRAM}.form": "over_encoding",
                f"{_ENGRAM}.layers": (0,),
                "optimizer.memory_lr_multiplier": float(rate),
            },
        )
        for rate in (1, 25)
    },
    "scone": (
        SCONE,
        MATCHED,
        {
            f"{_ENGRAM}.form": "scone",
            f"{_ENGRAM}.layers": (0,),
            f"{_ENGRAM}.heads_per_order": 1,
        },
    ),
    "product_keys": (PRODUCT_KEYS, MATCHED, {**_PRODUCT_KEYS, f"{_KEYS}.dim": 88}),
    "ultramem": (
        PRODUCT_KEYS,
        MATCHED,
        {**_PRODUCT_KEYS, f"{_KEYS}.dim": 64, f"{_KEYS}.expansion": 4},
    ),
    "memory_rate_1": (ENGRAM, SAME, {"optimizer.memory_lr_multiplier": 1.0}),
    "memory_rate_25": (ENGRAM, SAME, {"optimizer.memory_lr_multiplier": 25.0}),
}

# Where the memory is not Engram's: the key that fills P_tot, and what it must be a multiple of. The
# widths of the values above are those for which whole numbers of sub-keys come within 0.1 %.
SIZES = {"product_keys": (f"{_KEYS}.sub_keys", 1), "ultramem": (f"{_KEYS}.sub_keys", 4)}


def base() -> ml_collections.ConfigDict:
    """The budget: the pure MoE."""
    return allocation.plain(moe_tiny.get_config())


def reference() -> ml_collections.ConfigDict:
    """Engram with the experts of RHO."""
    variant = parse_config(allocation.plain(engram_tiny.get_config()))
    solved = budgets.solve(parse_config(base()), variant, RHO)
    return ml_collections.ConfigDict(to_dict(solved))


def build(point: Point) -> ml_collections.ConfigDict:
    _, rule, keys = VARIANTS[str(point.value)]
    config = reference()
    config.update_from_flattened_dict(keys)
    config.name = str(point.value)
    budget, variant = parse_config(base()), parse_config(config)
    if rule == MATCHED:
        size, step = SIZES.get(config.name, (budgets.ROWS, 1))
        variant = budgets.solve(budget, variant, size=size, step=step)
    elif rule in (ACTIVE, TOTAL):
        variant = budgets.solve_width(budget, variant, rule)
    return ml_collections.ConfigDict(to_dict(dataclasses.replace(variant, name=config.name)))


FAMILIES = tuple(dict.fromkeys(family for family, _, _ in VARIANTS.values()))

EXPERIMENT = Experiment(
    name="components",
    title="Components and controls at one budget",
    base=base,
    build=build,
    points=tuple(Point("variant", name, name, family) for name, (family, _, _) in VARIANTS.items()),
    baseline="variant=engram",
    seeds=(0, 1, 2),
    rates=dict.fromkeys(FAMILIES, RATES),
    tune={
        family: f"variant={next(name for name, found in VARIANTS.items() if found[0] == family)}"
        for family in FAMILIES
    },
    axis="difference to the reference",
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
