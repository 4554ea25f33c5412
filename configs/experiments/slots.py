"""More slots, nothing else changed: the paper's "infinite memory", at the demo's size.

    python launch.py --mode=sweep --config=configs/experiments/slots.py
    python launch.py --config=configs/experiments/slots.py:engram=4096,seed=1

The backbone of configs/engram_tiny.py with tables of 64 to 65,536 rows per head, each four times as
large as the one before, and without tables. Nothing compensates for the rows: parameters grow, the
FLOPs per token stay (the mismatch is shown against the backbone alone). 400 steps of 16 x 128
tokens, about 5 minutes a run on 2 cores, longer for the largest tables.
"""

import ml_collections

from configs import engram_tiny
from configs.experiments import allocation
from engram_jax.config.errors import UserError
from engram_jax.lab.experiment import Experiment, Point

SIZES = (64, 256, 1024, 4096, 16_384, 65_536)
RATES = (4e-3, 8e-3, 16e-3)
# Key of the points -> name, overrides, and rows per head as a multiple of the point's value: forms
# with fewer heads have as many more rows in each, so that one value means as many slots.
FORMS = {
    "engram": ("Engram", {}, 1),
    "over_encoding": (
        "OverEncoding",
        {"model.engram.form": "over_encoding", "model.engram.layers": (0,)},
        2,
    ),
}


def base() -> ml_collections.ConfigDict:
    """The backbone without memory."""
    config = allocation.plain(engram_tiny.get_config())
    config.model.engram.layers = ()
    return config


def build(point: Point) -> ml_collections.ConfigDict:
    if point.value == 0:
        return base()
    config = allocation.plain(engram_tiny.get_config())
    _, overrides, multiple = FORMS[point.key]
    config.update_from_flattened_dict(overrides)
    config.model.engram.rows_per_head = (multiple * int(point.value),)
    return config


def point_at(key: str, rows: float) -> Point:
    if key not in FORMS:
        raise UserError(f"{key}={rows:g}: the one point without tables is none=0")
    if rows < 1 or rows != int(rows):
        raise UserError(f"{key}={rows:g}: must be a whole number of rows per head >= 1")
    return Point(key, int(rows), FORMS[key][0], FORMS[key][0])


EXPERIMENT = Experiment(
    name="slots",
    title="Held-out loss by the number of slots, with the same backbone",
    base=base,
    build=build,
    points=(
        Point("none", 0, "no memory", "MoE"),
        *(point_at(form, size) for form in FORMS for size in SIZES),
    ),
    baseline="none=0",
    seeds=(0, 1, 2),
    rates={"MoE": RATES, **{name: RATES for name, _, _ in FORMS.values()}},
    tune={"MoE": "none=0", **{name: f"{form}=4096" for form, (name, _, _) in FORMS.items()}},
    axis="slots: rows of all tables",
    column="rows",
    log_axis=True,
    free=point_at,
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    return EXPERIMENT.config(argument)
