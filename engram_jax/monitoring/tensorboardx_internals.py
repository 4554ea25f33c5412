"""TensorBoard's event file where the disk is full.

The one file with private use of tensorboardX: the writer of a `SummaryWriter`'s file
(`_get_file_writer().event_writer._ev_writer`) and its three methods. None of it is promised to the
next release: pyproject.toml bounds tensorboardX below the next minor one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

METHODS = ("write_event", "flush", "close")  # what the thread of the file calls


def survive_a_full_disk(board: Any) -> None:
    """Let TensorBoard's file end where the disk does: an error would end the writer's thread, and
    with it, for ever, who waits for its queue. metrics.jsonl has the same numbers, and raises."""
    import tensorboardX

    events = tensorboardX.SummaryWriter._get_file_writer(board).event_writer._ev_writer
    for name in METHODS:
        setattr(events, name, _without_os_errors(getattr(events, name)))


def _without_os_errors(function: Callable[..., Any]) -> Callable[..., None]:
    def quiet(*args: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
            function(*args)

    return quiet
