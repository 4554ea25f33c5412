"""What the host delivers: rows from DRAM, distinct rows of real text, rows through the cache.

    python -m benchmarks.host_gather --json=benchmarks/results/host_gather.json

A table of FP8 rows (256 bytes and 8 of scales) of more than 4 GiB, 24 rows per token. The bound of
a gather is not the machine's copy bandwidth but what random pieces of 256 bytes can be read at: a
kernel that only reads them, with and without prefetch, on all cores.

Calls take turns, and the best of many short rounds counts (the medians are in the JSON file): on a
machine with two cores anything else that runs takes one of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, uint64

from benchmarks.harness import Figure, Result, table, take_turns, write_json
from benchmarks.text_addresses import open_text
from engram_jax.hardware.cores import cores
from engram_jax.hardware.numba_internals import load_8, prefetch
from engram_jax.memory.store.distinct_rows import distinct
from engram_jax.memory.store.dram import HostTable, host_array
from engram_jax.memory.store.gather_rows import gather_rows, split
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.row_format import RowFormat

FORMAT = RowFormat("fp8", 256)
ROWS_PER_HEAD, HEADS, TOKENS = 720_000, 24, 4_096  # 17.3 M rows: 4.2 GiB of weights
BATCH = TOKENS * HEADS
ROUNDS = 100


@njit(nogil=True)
def read_only(start, ids, ahead):  # type: ignore[no-untyped-def]
    """Sum of one word of each of the four lines of a piece of 256 bytes: memory delivers whole
    lines, and adding up all words would cost more than a copy's wide moves do."""
    a = b = c = d = uint64(0)
    for i in range(ids.size):
        if i + ahead < ids.size:
            later = uint64(start) + uint64(ids[i + ahead]) * uint64(256)
            for line in range(0, 256, 64):
                prefetch(later + uint64(line))
        here = uint64(start) + uint64(ids[i]) * uint64(256)
        a += load_8(here)
        b += load_8(here + uint64(64))
        c += load_8(here + uint64(128))
        d += load_8(here + uint64(192))
    return a + b + c + d


def on_all_cores(work: Any, ids: np.ndarray) -> None:
    split(len(ids), lambda begin, end: work(ids[begin:end]))


def filled(rows: int, size: int, huge_pages: bool) -> np.ndarray:
    array = host_array(rows, size, huge_pages=huge_pages)
    words = array.view(np.uint64)
    for begin in range(0, rows, 1 << 20):
        end = min(rows, begin + (1 << 20))
        words[begin:end] = np.arange(begin, end, dtype=np.uint64)[:, None]
    return array


def random_rows(rows: int, huge_pages: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Gather of random rows against the bound."""
    array, rng = filled(rows, 256, huge_pages), np.random.default_rng(0)
    ids = [rng.integers(0, rows, BATCH).astype(np.int32) for _ in range(16)]
    out, turn = FORMAT.empty(BATCH)[0], iter(range(10**9))
    out[:] = 0

    def fresh() -> np.ndarray:
        return ids[next(turn) % len(ids)]

    start = array.ctypes.data
    calls: dict[str, Any] = {
        f"read only, {ahead} ahead": lambda ahead=ahead: on_all_cores(
            lambda some: read_only(start, some, ahead), fresh()
        )
        for ahead in (0, 8, 16, 32)
    }
    calls |= {
        f"gather, {ahead} ahead": lambda ahead=ahead: gather_rows(array, fresh(), out, ahead)
        for ahead in (0, 8, 16, 24, 48)
    }
    calls["numpy.take"] = lambda: np.take(array, fresh(), axis=0, out=out, mode="clip")
    seconds = take_turns(calls, rounds=ROUNDS)
    rate = {name: BATCH * 256 / min(s) / 1e9 for name, s in seconds.items()}
    medians = {name: BATCH * 256 / statistics.median(s) / 1e9 for name, s in seconds.items()}
    bound = min(
        (name for name in calls if name.startswith("read")),
        key=lambda n: min(seconds[n]),
    )
    share = rate["gather, 24 ahead"] / rate[bound]
    pages = "huge pages" if huge_pages else "4 KiB pages"
    beside = f"{rate['gather, 24 ahead']:.1f} of {rate[bound]:.1f} GB/s ({bound})"
    beside += f"; numpy.take {rate['numpy.take']:.1f}"
    figure = Figure(
        f"random rows, {pages}: gather / reading alone",
        share,
        "",
        at_least=0.6 if huge_pages else None,
        note=beside,
    )
    return [figure], {f"{pages}, GB/s": rate, f"{pages}, GB/s, medians": medians}


def small_gathers(source: HostTable) -> tuple[list[Figure], dict[str, Any]]:
    """64 x 24 rows in the calling thread: random ones, and ones in the processor's cache."""
    rng, count = np.random.default_rng(1), 64 * HEADS
    out = FORMAT.empty(count)
    cold = [rng.integers(0, source.rows, count).astype(np.int32) for _ in range(64)]
    turn = iter(range(10**9))
    calls = {
        "from DRAM": lambda: source.gather(cold[next(turn) % 64], out),
        "from the processor's cache": lambda: source.gather(cold[0], out),
        "one row": lambda: source.gather(cold[0][:1], tuple(o[:1] for o in out)),
    }
    micro = {}
    for name, call in calls.items():
        micro[name] = 1e6 * min(take_turns({name: call}, rounds=1_000)[name])
    # Among 64 x 1,536 rows a batch's rows come round again after 26 MB: partly in the L3.
    note = f"{count} rows; one row {micro['one row']:.1f} us"
    hot = micro["from the processor's cache"]
    return [
        Figure("64 tokens, rows in the processor's cache", hot, "us", at_most=30, note=note),
        Figure("64 tokens, rows in DRAM", micro["from DRAM"], "us", note="one core"),
    ], {"small, us": micro}


def real_text(source: HostTable, batches: list[np.ndarray]) -> tuple[list[Figure], dict[str, Any]]:
    """Batches of 4,096 tokens of text: distinct rows and their numbers, against numpy.take."""
    weight, scale = source.parts
    out, few = FORMAT.empty(BATCH), FORMAT.empty(BATCH)
    turns = {
        name: iter(range(10**9)) for name in ("take", "into", "distinct", "sort", "expand", "all")
    }

    def ids(name: str) -> np.ndarray:
        return batches[next(turns[name]) % len(batches)]

    def take() -> None:
        some = ids("take")
        for part in source.parts:
            np.take(part, some, axis=0)

    def take_into() -> None:
        some = ids("into")
        np.take(weight, some, axis=0, out=out[0], mode="clip")
        np.take(scale, some, axis=0, out=out[1], mode="clip")

    def deduplicated(name: str = "distinct") -> tuple[Any, np.ndarray]:
        unique, inverse = distinct(ids(name))
        rows = tuple(part[: unique.size] for part in few)
        source.gather(unique, rows)
        return rows, inverse

    def expanded() -> None:
        rows, inverse = deduplicated("expand")
        for part, buffer in zip(rows, out, strict=True):
            gather_rows(part, inverse, buffer)

    calls: dict[str, Callable[[], Any]] = {
        "numpy.take": take,
        "numpy.take into a buffer": take_into,
        "distinct rows": deduplicated,
        "sorting alone": lambda: distinct(ids("sort")),
        "expanded on the host": expanded,
        "all rows, no sorting": lambda: source.gather(ids("all"), out),
    }
    seconds = take_turns(calls, rounds=2 * ROUNDS)
    medians = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    milli = {name: 1e3 * min(s) for name, s in seconds.items()}
    share = statistics.mean(np.unique(b).size / b.size for b in batches)
    speed = {name: milli["numpy.take"] / ms for name, ms in milli.items()}
    note = (
        f"{milli['distinct rows']:.2f} ms, of it sorting {milli['sorting alone']:.2f}; numpy.take"
    )
    note += f" {milli['numpy.take']:.2f}, into a buffer {milli['numpy.take into a buffer']:.2f} ms;"
    note += f" {100 * share:.0f} % of the rows are distinct"
    return [
        Figure(
            "4,096 tokens of text: distinct rows",
            speed["distinct rows"],
            "x",
            at_least=3,
            note=note,
        ),
        Figure("the same, expanded on the host", speed["expanded on the host"], "x"),
        Figure("all rows as they come", speed["all rows, no sorting"], "x"),
    ], {"text, ms": milli, "text, ms, medians": medians, "distinct share": share}


def through_cache(
    source: HostTable, batches: list[np.ndarray]
) -> tuple[list[Figure], dict[str, Any]]:
    """What the cache costs per lookup, where the source behind it costs nothing to speak of."""
    cache = CachedTable(source, source.rows // 10)
    each = [distinct(batch)[0] for batch in batches]
    out = FORMAT.empty(BATCH)
    for ids in each:
        cache.gather(ids, tuple(part[: ids.size] for part in out))
    book = cache._sets
    nano: dict[str, list[float]] = {"look": [], "look and copy, all hits": []}
    for ids in each * 3:
        slots = np.empty(ids.size, np.int32)
        began = time.perf_counter()
        book.look(ids, slots)
        nano["look"].append((time.perf_counter() - began) / ids.size * 1e9)
        inside = np.ascontiguousarray(ids[slots >= 0])
        rows = tuple(part[: inside.size] for part in out)
        began = time.perf_counter()
        cache.gather(inside, rows)
        nano["look and copy, all hits"].append((time.perf_counter() - began) / inside.size * 1e9)
    admitted = []
    for ids in each:
        fresh = CachedTable(source, source.rows // 100)._sets
        slots = np.empty(ids.size, np.int32)
        fresh.admit(ids, slots)
        began = time.perf_counter()
        fresh.admit(ids ^ 1, slots)
        admitted.append((time.perf_counter() - began) / ids.size * 1e9)
    median = {name: statistics.median(values) for name, values in nano.items()}
    median["admit"] = statistics.median(admitted)
    note = f"with the row's copy {median['look and copy, all hits']:.0f} ns; a miss is admitted in"
    note += f" {median['admit']:.0f} ns"
    return [Figure("the cache, per lookup", median["look"], "ns", at_most=100, note=note)], {
        "cache, ns": median
    }


def measure() -> Result:
    text = open_text(ROWS_PER_HEAD)
    addresses = np.concatenate(list(text.addresses(text.tokens[: TOKENS * 400])))
    batches = [addresses[i * TOKENS : (i + 1) * TOKENS].reshape(-1) for i in range(0, 400, 10)]
    figures: list[Any] = []
    details: dict[str, Any] = {}
    for huge_pages in (True, False):
        some, raw = random_rows(text.rows, huge_pages)
        figures, details = figures + some, details | raw
    parts = [filled(text.rows, size, True) for _, size in FORMAT.parts]
    source = HostTable(FORMAT, parts)
    for part in (lambda: small_gathers(source), lambda: real_text(source, batches)):
        some, raw = part()
        figures, details = figures + some, details | raw
    some, raw = through_cache(source, batches)
    setting = f"{text.rows:,} rows, {cores()} cores; {text.name}"
    return Result("host_gather", setting, figures + some, details | raw)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there, too")
    options = parser.parse_args()
    outcome = measure()
    print(table(outcome), flush=True)
    if options.json:
        write_json(options.json, [outcome])
