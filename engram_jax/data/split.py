"""The held-out split: by document, decided by the document's content, never by its position."""

from __future__ import annotations

import numpy as np

from engram_jax.config.errors import UserError


def hold_out(
    digests: np.ndarray,
    sizes: np.ndarray,
    fraction: float,
    origins: np.ndarray | None = None,
    source: str = "the text",
) -> np.ndarray:
    """Which documents are held out: bool [documents].

    A document is held out when its digest, read as a number in [0, 1), is below `fraction`; so
    adding documents moves none from one side to the other. Pieces of one document (equal `origins`)
    share the digest of the first piece. Where that leaves a side empty, the document whose size
    comes closest to the wanted share is held out alone.

    digests: uint8 [documents, >= 8]; sizes: int64 [documents], bytes; source: named in errors.
    Raises UserError when there are not two documents to tell apart.
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
    held = heads.astype(np.float64) / 2.0**64 < fraction
    if held.all() or not held.any():
        group_sizes = np.bincount(group, weights=sizes)
        distance = np.abs(group_sizes - fraction * group_sizes.sum())
        held = np.arange(len(first)) == np.lexsort((heads, distance))[0]
    return held[group]
