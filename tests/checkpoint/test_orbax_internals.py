"""What a save that failed leaves behind is not printed beside its error."""

from __future__ import annotations

import gc
import warnings

from engram_jax.checkpoint.orbax_internals import quiet_closed_loops


async def async_serialize_from_host() -> None:
    """Named like Orbax's, of whose fragments some are never written."""


async def another() -> None: ...


def test_fragments_that_were_never_written_are_not_warned_of():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_closed_loops()
        async_serialize_from_host()  # never awaited
        another()
        gc.collect()
    assert len(told) == 1 and "another" in str(told[0].message)
