"""What a process that makes batches owes to the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

_begun = False


def belong_to_parent() -> None:
    """In a worker process: end when the parent ends, however that is, and leave signals to it.

    A signal to the whole process group (Ctrl-C, a batch system) then ends no worker while the
    parent still takes batches to reach the step at which it saves. A no-op in any other process,
    and when called again.
    """
    global _begun
    parent = multiprocessing.parent_process()
    if parent is None or _begun:
        return
    _begun = True
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(0)

    threading.Thread(target=wait, name="parent", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
