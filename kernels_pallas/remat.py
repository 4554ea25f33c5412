"""Rematerialisation for the references: they keep only their arguments, as the kernels do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def keeps_arguments(function: F) -> F:
    """Decorator: keep only the arguments as residuals, where they are narrower than float32.

    Rows and streams in bfloat16 or FP8 are converted to float32 inside; as residuals, those would
    take several times the memory of the arguments. So they are recomputed. Where the first argument
    is float32 or wider, nothing would be saved, and everything is kept.

    function: its positional arguments are arrays or pytrees of them, its keyword arguments static.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **static: Any) -> Any:
        call = functools.partial(function, **static)
        narrow = jax.tree.leaves(args[0])[0].dtype.itemsize < 4
        return (jax.checkpoint(call) if narrow else call)(*args)

    return wrapped  # type: ignore[return-value]
