"""Lines for the user, of several threads at once."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest

from engram_jax.distributed import processes
from engram_jax.serve.http import server


class Stream(io.StringIO):
    """One that lets other threads go on behind every write."""

    def write(self, text: str) -> int:
        written = super().write(text)
        time.sleep(0.001)
        return written


@pytest.mark.parametrize(
    ("say", "name", "before"),
    [
        (processes.log, "stdout", ""),
        (processes.warn, "stderr", "warning: "),
        (processes.stages(), "stdout", r"\[ *\d+\.\d s\] "),
        (server.tell, "stdout", ""),
    ],
)
def test_lines_of_several_threads_stay_whole(say, name, before, monkeypatch):
    stream = Stream()
    monkeypatch.setattr(f"sys.{name}", stream)
    start = threading.Barrier(4)

    def several(digit: str) -> None:
        start.wait()
        for _ in range(5):
            say(digit * 8)

    threads = [threading.Thread(target=several, args=(digit,)) for digit in "0123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = stream.getvalue().split("\n")
    assert lines.pop() == "" and len(lines) == 20
    pattern = re.compile(rf"{before}(?:0{{8}}|1{{8}}|2{{8}}|3{{8}})")
    assert all(pattern.fullmatch(line) for line in lines), lines
