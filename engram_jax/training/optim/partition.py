"""Which optimizer owns which parameter: the one place where parameter names are given a meaning.

Muon takes weight matrices that map a vector to a vector, also when they are stacked (scanned
layers, experts, the Engram module's M keys and value). Everything else takes AdamW: the embedding
and the head, and what scales or selects rather than maps - norm gains, biases, gates (router, mHC
coefficients), and the depthwise taps, which are no matrix. Tables are not parameters; see
training/optim/rowwise_adam.py.
"""

from __future__ import annotations

from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from engram_jax.sharding.rules import names

MUON, ADAMW, ADAMW_NO_DECAY = "muon", "adamw", "adamw_no_decay"

# Stacks of any depth end in [..., in, out].
_MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
# [d_mem, M + 1, d]: M + 1 separate maps d_mem -> d.
_FUSED_PROJECTION = MuonDimensionNumbers(reduction_axis=-3, output_axis=-1)

MUON_MATRICES = {
    "q_proj": _MATRIX,
    "kv_a_proj": _MATRIX,
    "kv_b_proj": _MATRIX,
    "o_proj": _MATRIX,
    "gate": _MATRIX,
    "up": _MATRIX,
    "down": _MATRIX,
    "projection": _FUSED_PROJECTION,
}
ADAMW_DECAYED = {"embedding", "head", "router", "fn"}
ADAMW_PLAIN = {"gain", "norm_gain", "bias", "base", "scale", "taps"}


def label(path: Any) -> str:
    """The optimizer of the parameter at a key path. A name nobody has classified is an error."""
    leaf = names(path)[-1]
    if leaf in MUON_MATRICES:
        return MUON
    if leaf in ADAMW_DECAYED:
        return ADAMW
    if leaf in ADAMW_PLAIN:
        return ADAMW_NO_DECAY
    raise ValueError(f"parameter {'/'.join(names(path))} has no optimizer: add it to {__name__}")


def labels(params: Any) -> Any:
    """The tree of `label`s of a parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: label(path), params)
