"""Which parameters and tables a run updates (`train.trainable`), and the two parts of a tree.

Where all are updated nothing here changes a program. A part of a tree has None where an array
belongs to the other part, and JAX sees no leaf there: the optimizer keeps no state for it.
"""

from __future__ import annotations

from typing import Any

import jax

from engram_jax.config import FROZEN, Config
from engram_jax.config.path_patterns import chosen
from engram_jax.sharding.rules import names

MEMORY = "memory"


def trained_paths(config: Config, params: Any, layers: list[str]) -> frozenset[str] | None:
    """The paths of what is updated, "memory/LAYER" of a table; None = all that can be.

    params: the tree of parameters; layers: of the tables. Tables under `memory_optimizer` "frozen"
    are not updated, whatever the patterns say, and a pattern for them alone matches nothing.

    Raises UserError for a pattern that matches nothing.
    """
    if not config.train.trainable:
        return None
    frozen = config.optimizer.memory_optimizer == FROZEN
    tables = [] if frozen else [f"{MEMORY}/{layer}" for layer in layers]
    return chosen(config.train.trainable, [*paths(params), *tables], "train.trainable")


def paths(params: Any) -> list[str]:
    """The path of every parameter, such as "engrams/1/projection"."""
    return ["/".join(names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def split_trained(params: Any, trained: frozenset[str] | None) -> tuple[Any, Any]:
    """(what is updated, what is not), each with None in place of the other."""
    if trained is None:
        return params, None

    def part(mine: bool) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if ("/".join(names(path)) in trained) == mine else None, params
        )

    return part(True), part(False)


def join_trained(updated: Any, kept: Any) -> Any:
    """The inverse of `split_trained`."""
    if kept is None:
        return updated
    return jax.tree.map(
        lambda a, b: b if a is None else a, updated, kept, is_leaf=lambda x: x is None
    )
