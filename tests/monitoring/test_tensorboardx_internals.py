"""What is used of tensorboardX's own parts is there, and a full disk ends its file alone."""

from __future__ import annotations

import errno
import threading

from tensorboardX import SummaryWriter

from engram_jax.monitoring.tensorboardx_internals import METHODS, survive_a_full_disk


def test_a_full_disk_ends_the_file_and_no_thread(tmp_path, monkeypatch):
    """Written for tensorboardX 2.6.5 (2.6.4 is the same)."""
    failed: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda found: failed.append(str(found.exc_value)))
    board = SummaryWriter(str(tmp_path), max_queue=1, flush_secs=0)
    events = board._get_file_writer().event_writer._ev_writer
    called: list[str] = []

    def full(name: str):
        def raises(*args):
            called.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")

        return raises

    for name in METHODS:
        assert callable(getattr(events, name))
        monkeypatch.setattr(events, name, full(name))
    survive_a_full_disk(board)
    for step in range(30):
        board.add_scalar("loss", 1.0, step)
    board.flush()  # would wait for ever for a thread that has ended
    board.close()
    assert set(called) == set(METHODS) and failed == []
