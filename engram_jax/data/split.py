"""Chooses the held-out documents, by their content and not by their position."""

from __future__ import annotations

import numpy as np

from engram_jax.config.errors import UserError


def below(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Whether digests uint8 [n, >= 8], read as numbers in [0, 1), are below: bool [n]."""
    heads = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
    return heads.astype(np.float64) / 2.0**64 < fraction


def missed(held: int, train: int, fraction: float) -> str:
    """A line for the user if the share of the bytes that is held out misses `fraction` by half of
    it or more, else ""."""
    share = held / max(1, held + train)
    if abs(share - fraction) < fraction / 2:
        return ""
    return (
        f"{share:.2%} of the text is held out, not the {fraction:.2%} that"
        " config.data.validation_fraction asks for: its documents are too few, or too unequal"
    )


def hold_out(
    digests: np.ndarray,
    sizes: np.ndarray,
    fraction: float,
    origins: np.ndarray | None = None,
    source: str = "the text",
) -> np.ndarray:
    """Which documents are held out: bool [documents].

    A document is held out when its digest, read as a number in [0, 1), is below `fraction`; so
    adding documents moves none from one side to the other. Parts of one document (equal `origins`)
    share the digest of the first part. Where that leaves a side empty, only the document whose size
    is closest to the wanted share is held out.

    digests: uint8 [documents, >= 8]; sizes: int64 [documents], bytes; source: named in errors.
    Raises UserError when there are fewer than two whole documents.
    """
    if origins is None:
        origins = np.arange(len(sizes))
    _, first, group = np.unique(origins, return_index=True, return_inverse=True)
    if len(first) < 2:
        raise UserError(
            f"{source}: {len(first)} usable document(s), {int(sizes.sum()):,} bytes: too little to "
            "hold some out for validation; give more text"
        )
    heads = np.ascontiguousarray(digests[first, :8]).view(">u8")[:, 0]
    held = below(digests[first], fraction)
    if held.all() or not held.any():
        group_sizes = np.bincount(group, weights=sizes)
        distance = np.abs(group_sizes - fraction * group_sizes.sum())
        held = np.arange(len(first)) == np.lexsort((heads, distance))[0]
    return held[group]
