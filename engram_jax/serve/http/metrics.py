"""Counts and times of requests, and the server's numbers in Prometheus' text format 0.0.4."""

from __future__ import annotations

import re
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from engram_jax.serve.request import Delta, Finish

# Upper ends of the histograms' buckets, s.
BUCKETS = tuple(digits * 10.0**power for power in range(-3, 3) for digits in (1, 2.5, 5))

# The engine's statistics (Engine.stats): type, meaning.
ENGINE: Mapping[str, tuple[str, str]] = {
    "running": ("gauge", "Sequences that have a slot."),
    "waiting": ("gauge", "Sequences that have not begun."),
    "moved_out": ("gauge", "Sequences whose state was moved to host memory."),
    "free_pages": ("gauge", "Pages of the key-value cache that no sequence needs."),
    "pages": ("gauge", "Pages of the key-value cache."),
    "evictions": ("counter", "Times that a sequence's state was moved to host memory."),
    "prefix_hits": ("counter", "Sequences of whose prompt a part was taken from the cache."),
    "prefix_hit_tokens": ("counter", "Tokens of prompts that were taken from the cache."),
    "prefix_pages": ("gauge", "Pages with beginnings of prompts, which others may take."),
    "steps": ("counter", "Iterations of the engine."),
    "prompt_tokens": ("counter", "Tokens of prompts that were computed."),
    "generated_tokens": ("counter", "Tokens that were drawn, those that end answers included."),
    "rows_lookups": ("counter", "Rows of the memory that tokens needed."),
    "rows_hits_device": ("counter", "Of these, rows that were on the device."),
    "rows_hits_host_cache": (
        "counter",
        "Found in the host's cache before the file, with padding.",
    ),
    "rows_moved_rows": ("counter", "Rows moved to the device, those of padding included."),
    "rows_moved_bytes": ("counter", "Bytes moved to the device for them."),
    "rows_file_bytes": ("counter", "Bytes of the memory file that were read and verified."),
    "rows_seconds": ("counter", "Seconds of the host for rows."),
    "waits": ("counter", "Times that the host waited for rows."),
    "wait_seconds": ("counter", "Seconds that the host waited for rows."),
    "late": ("counter", "Waits in which the device ran out of work."),
    "late_seconds": ("counter", "Seconds of these."),
    "read_errors": ("counter", "Sequences that ended because rows could not be read."),
}


class Histogram:
    """Counts of seconds by `BUCKETS`."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def samples(self) -> Iterable[tuple[str, float]]:
        total = 0
        for end, count in zip((*BUCKETS, float("inf")), self.counts, strict=True):
            total += count
            yield f'_bucket{{le="{"+Inf" if end == float("inf") else f"{end:g}"}"}}', total
        yield "_sum", self.sum
        yield "_count", total


class Metrics:
    """What is counted of requests. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()
        self.finished = dict.fromkeys(Finish, 0)

    def text(self, engine: Mapping[str, float], responses: Mapping[int, int], active: int) -> str:
        """All families. responses: by status. active: requests that are being answered."""
        lines: list[str] = []

        def family(
            name: str, kind: str, meaning: str, samples: Iterable[tuple[str, float]]
        ) -> None:
            lines.append(f"# HELP engram_{name} {meaning}")
            lines.append(f"# TYPE engram_{name} {kind}")
            lines.extend(f"engram_{name}{label} {float(value)!r}" for label, value in samples)

        for key, value in sorted(engine.items()):
            kind, meaning = ENGINE.get(key, ("untyped", "A statistic of the engine."))
            family(re.sub(r"[^a-zA-Z0-9_]", "_", key), kind, meaning, [("", value)])
        family("active_requests", "gauge", "Requests that are being answered.", [("", active)])
        with self.lock:
            failed = self.finished[Finish.ERROR]
            reasons = [(f'{{reason="{key}"}}', count) for key, count in self.finished.items()]
            times = [list(h.samples()) for h in (self.first, self.between, self.whole)]
        family("finished_sequences_total", "counter", "Sequences that ended, by reason.", reasons)
        family("failed_sequences_total", "counter", "Those with an error.", [("", failed)])
        names = {
            "time_to_first_token_seconds": "From a request's head to a sequence's first token.",
            "inter_token_seconds": "Between two tokens of a sequence.",
            "sequence_seconds": "From a request's head to a sequence's end.",
        }
        for (name, meaning), samples in zip(names.items(), times, strict=True):
            family(name, "histogram", meaning, samples)
        statuses = [(f'{{status="{key}"}}', count) for key, count in sorted(responses.items())]
        meaning = "Responses by status, counted at their end; a stream's is how it ended."
        family("http_responses_total", "counter", meaning, statuses)
        return "\n".join(lines) + "\n"


class Timing:
    """The times of one request's sequences.

    began: `time.monotonic()` of its arrival. accepted: set it when the engine has taken them.
    sampled: tokens so far. finishes: of the sequences that have ended, by reason.
    """

    def __init__(self, metrics: Metrics, began: float, sequences: int):
        self._metrics, self._began = metrics, began
        self._last: dict[int, float] = {}  # place -> its last token's time
        self._open = set(range(sequences))
        self.accepted, self.sampled = False, 0
        self.finishes: Counter[str] = Counter()

    def note(self, place: int, delta: Delta) -> None:
        """What a sequence's delta says. Any thread."""
        now, metrics = time.monotonic(), self._metrics
        with metrics.lock:
            if place not in self._open:
                return
            self.sampled += delta.sampled
            if delta.sampled:
                last = self._last.get(place)
                into = metrics.first if last is None else metrics.between
                into.add(now - (self._began if last is None else last))
                self._last[place] = now
            if delta.finish is not None:
                self._open.discard(place)
                self.finishes[delta.finish] += 1
                metrics.finished[delta.finish] += 1
                metrics.whole.add(now - self._began)

    def close(self) -> None:
        """What has not ended is cancelled."""
        with self._metrics.lock:
            if self.accepted and self._open:
                self.finishes[Finish.CANCELLED] += len(self._open)
                self._metrics.finished[Finish.CANCELLED] += len(self._open)
            self._open.clear()
