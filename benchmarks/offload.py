"""What memory off the chip costs a server: the paper's throughput table, on any machine.

    python -m benchmarks.offload                                    # this machine, half an hour
    python -m benchmarks.offload --backbone=dense4b --rows_per_head=16000000 --together=64 \
      --answer=100:1024 --slice=64 --variants=alone,host,host_cache

Sequences with prompts of Uniform(100, 1024) tokens of real text are served by engines that differ
in where the table lies: nowhere (the backbone alone), on the device, in DRAM, in DRAM behind a
device cache, in a file behind a DRAM cache. They serve the same stream of sequences, a few steps at
a time and in turns: step i computes the same in all of them, and whatever else the machine does
meets all. The cost is the ratio of the times to the table on the device, with its 95 % interval
over these slices; what is still under way at a slice's end is waited for and counts. Answers are
the text's own continuation, whatever the untrained backbone would say: what is read of the table
then is what real text reads (the whole step is computed all the same).

All variants must give the same log-probabilities to the last bit, the backbone alone others.

--limit_share=0.25 leaves the page cache so much of the table's size (benchmarks/page_cache.py), so
that a file is read from the disk indeed. Without it the page cache may hold the whole file.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, page_cache
from benchmarks.offload_engines import (
    BACKBONES,
    LAYER,
    VARIANTS,
    FirstHalf,
    engines,
    frequencies,
    model,
    requests,
)


def options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), default="scaled")
    parser.add_argument("--variants", default="device,host", help=",".join(VARIANTS))
    parser.add_argument("--rows_per_head", type=int, default=500_000, help="of 24 heads of 256")
    parser.add_argument("--sequences", type=int, default=512, help="in all, as in the paper")
    parser.add_argument("--slice", type=int, default=2, help="steps between two turns")
    parser.add_argument("--warm_up", type=int, default=16, help="sequences that do not count")
    parser.add_argument("--together", type=int, default=8, help="decoded together")
    parser.add_argument("--prompt", default="100:1024", help="tokens, LOW:HIGH")
    parser.add_argument("--answer", default="32:96", help="tokens, LOW:HIGH")
    parser.add_argument("--device_cache", type=float, default=0.01, help="share of the rows")
    parser.add_argument("--host_cache", type=float, default=0.1, help="share of the rows")
    parser.add_argument("--file", type=Path, help="where the table's file is kept; default: made")
    parser.add_argument("--limit_share", type=float, default=0.0, help="page cache by the table")
    return parser.parse_known_args(arguments)


def measure(chosen: argparse.Namespace, limited: page_cache.Group | None) -> harness.Result:
    import jax

    from engram_jax.serve.request import SamplingParams

    names = chosen.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        sys.exit(f"--variants: {', '.join(sorted(unknown))}: must be among {', '.join(VARIANTS)}")
    if limited is not None and "disk_cache" not in names:
        sys.exit("--limit_share: needs disk_cache among --variants")
    if names == ["alone"]:
        sys.exit("--variants: alone has nothing to be compared with")
    program, weights, data = model(chosen)
    store = data.store_train
    warm = chosen.warm_up
    prompts, script, wanted = requests(chosen, FirstHalf(store), warm + chosen.sequences)
    params = [SamplingParams(max_tokens=w, seed=i) for i, w in enumerate(wanted)]
    counted = frequencies(program, store)
    with tempfile.TemporaryDirectory(dir=harness.ROOT / ".venv") as folder:
        file = chosen.file or Path(folder) / "memory.safetensors"
        made, table_bytes = engines(chosen, names, program, weights, script, counted, file)
        for engine in made.values():
            engine.generate(prompts[:warm], params[:warm])
        _same_bits(made, prompts[:3])
        if limited is not None:
            stays = page_cache.forget(file)
            limited.limit(int(chosen.limit_share * table_bytes))
            if stays > 0.01:
                sys.exit(f"{stays:.1%} of the file stay in memory: other processes read it")
        before = {name: engine.stats() for name, engine in made.items()}
        seconds, from_disk, with_prompts = in_turns(
            chosen, made, prompts[warm:], params[warm:], limited
        )
        spent = {n: _difference(made[n].stats(), before[n]) for n in names}
        for engine in made.values():
            engine.close()
    tokens = sum(map(len, prompts[warm:])) + sum(wanted[warm:])
    figures = []
    for name in names:
        spent[name]["disk_bytes"] = from_disk[name]
        figures += _figures(name, seconds, with_prompts, spent[name], tokens)
    rows = program.table_rows[LAYER]
    size = sum(x.size for x in jax.tree.leaves(weights.params))
    setting = (
        f"{chosen.backbone} backbone, {size / 1e6:,.0f} M parameters, beside a table of"
        f" {rows * 256 / 1e9:.2f} B ({table_bytes / 1e9:.2f} GB, FP8); {chosen.sequences} sequences"
        f", {chosen.together} together, prompts {chosen.prompt}, answers {chosen.answer} tokens,"
        f" {chosen.slice} steps between turns; text: {data.report.source} ({data.report.digest})"
    )
    if limited is not None:
        most, allowed = max(limited.cache_bytes) / 1e9, limited.allowed / 1e9
        setting += f"; page cache allowed {allowed:.2f} GB, seen at most {most:.2f} GB"
    return harness.Result("offload", setting, figures, {"seconds": seconds, "stats": spent})


def in_turns(
    chosen: argparse.Namespace,
    made: dict[str, Any],
    prompts: list[list[int]],
    params: list[Any],
    limited: page_cache.Group | None,
) -> tuple[dict[str, list[float]], dict[str, int], np.ndarray]:
    """(seconds of every slice, bytes read from disks by variant; bool: slices with prompts)."""
    for engine in made.values():
        for prompt, own in zip(prompts, params, strict=True):
            engine.submit(prompt, own)
    names = list(made)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    from_disk = dict.fromkeys(names, 0)
    fed: list[bool] = []
    first = made[names[0]].stats()["prompt_tokens"]
    for turn in itertools.count():
        if not any(engine.busy for engine in made.values()):
            return seconds, from_disk, np.diff(fed, prepend=0) > 0
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            engine, read, began = made[name], page_cache.read_bytes(), time.perf_counter()
            for _ in range(chosen.slice):
                if engine.busy:
                    engine.step()
            _settle(engine)
            seconds[name].append(time.perf_counter() - began)
            from_disk[name] += page_cache.read_bytes() - read
            if limited is not None:
                limited.note()
        stats = [engine.stats() for engine in made.values()]
        done = {(s["prompt_tokens"], s["generated_tokens"]) for s in stats}
        if len(done) > 1:
            sys.exit("the variants do not compute the same in a step")
        fed.append(stats[0]["prompt_tokens"] - first)
        if turn % 10 == 9:
            told = ", ".join(f"{name} {sum(seconds[name]):.1f} s" for name in names)
            print(f"{turn + 1} slices: {told}", file=sys.stderr, flush=True)
    raise AssertionError


def _settle(engine: Any) -> None:
    """Wait for the rows that an engine has asked for and for what its device computes."""
    import jax

    _, _, asked = engine._ahead
    for found in asked.futures.values():
        jax.block_until_ready(found.result() if isinstance(found, Future) else found)
    jax.block_until_ready(engine._cache)


def _same_bits(made: dict[str, Any], prompts: list[list[int]]) -> None:
    """Ends the program unless all tables answer alike, and not as none does."""
    from engram_jax.serve.request import SamplingParams

    params = SamplingParams(max_tokens=4, logprobs=5)
    found = {name: engine.generate(prompts, params) for name, engine in made.items()}
    alone = found.pop("alone", None)
    first = next(iter(found.values()))
    if any(f != first for f in found.values()) or first == alone:
        sys.exit("the variants' log-probabilities are not what they should be")


def _difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {key: value - before.get(key, 0) for key, value in after.items()}


def _figures(
    name: str,
    seconds: dict[str, list[float]],
    prompts: np.ndarray,
    spent: dict[str, float],
    tokens: int,
) -> list[harness.Figure]:
    mine = seconds[name]
    figures = [harness.Figure(f"{name}: throughput", tokens / sum(mine), "tokens/s")]
    baseline = "device" if "device" in seconds else next(iter(seconds))
    occupied = spent["generated_tokens"] / spent["steps"]
    figures.append(harness.Figure(f"{name}: decoded together", occupied, "sequences"))
    if name != baseline:
        ratio, half = _interval(mine, seconds[baseline])
        upper = ratio + half
        bound = _bounds().get(name)
        beside = f"{_percent(ratio, half)} (95 %, {len(mine)} slices)"
        for kind, chosen in (("with prompts", prompts), ("decoding only", ~prompts)):
            if chosen.sum() > 1:
                pair = [np.asarray(x)[chosen].tolist() for x in (mine, seconds[baseline])]
                beside += f"; {kind} {_percent(*_interval(*pair))}"
                beside += f" ({sum(pair[1]) / sum(seconds[baseline]):.0%} of the time)"
        title = f"{name}: time by {baseline}'s"
        figures.append(harness.Figure(title, ratio, "", note=beside))
        if bound is not None:  # a mean below its bound shows nothing if the interval goes beyond
            title = f"{name}: the interval's upper end"
            figures.append(harness.Figure(title, upper, "", at_most=bound))
    if (lookups := spent.get("rows_lookups", 0)) and spent.get("rows_moved_rows"):
        moved = spent["rows_moved_bytes"] / tokens
        waited = spent["wait_seconds"] / spent["steps"] * 1e3
        late = spent["late_seconds"] / sum(mine)
        hit = f"hits on the device {spent['rows_hits_device'] / lookups:.1%} of the lookups"
        if cached := spent["rows_hits_host_cache"]:
            # A cache is asked once for each distinct row of a large batch.
            hit += f", in DRAM {cached / spent['rows_moved_rows']:.1%} of the rows moved"
        if spent["rows_file_bytes"]:
            hit += f"; {spent['rows_file_bytes'] / tokens / 1e3:.1f} kB/token of blocks verified"
            hit += f", {spent['disk_bytes'] / tokens / 1e3:.1f} kB/token read from the disk"
        host = spent["rows_seconds"] / sum(mine)
        figures += [
            harness.Figure(f"{name}: moved", moved / 1e3, "kB/token", note=hit),
            harness.Figure(
                f"{name}: host waits",
                waited,
                "ms/step",
                note=f"{late:.2%} of the time with the device idle; fetching {host:.2%}",
            ),
        ]
    return figures


def _percent(ratio: float, half: float) -> str:
    return f"{100 * (ratio - 1):+.2f} +- {100 * half:.2f} %"


def _bounds() -> dict[str, float]:
    """What the time may be at most, by the time of the table on the device."""
    import jax

    hot = 1.02 if jax.default_backend() == "cpu" else 1.01  # nothing is nearer to a CPU than DRAM
    return {"host": 1.02, "host_cache": hot, "disk_cache": 1.10}


def _interval(mine: list[float], baseline: list[float]) -> tuple[float, float]:
    """The ratio of the sums, and half of its 95 % interval.

    The slices differ in length (prompts, or none), so that the ratio of the sums is what counts;
    its error is that of the mean of a - ratio b (the delta method), Student's t.
    """
    from scipy import stats

    ratio, count = sum(mine) / sum(baseline), len(mine)
    if count < 2:
        return ratio, float("inf")
    rest = [a - ratio * b for a, b in zip(mine, baseline, strict=True)]
    error = statistics.stdev(rest) * count**0.5 / sum(baseline)
    return ratio, float(stats.t.ppf(0.975, count - 1)) * error


if __name__ == "__main__":
    chosen, rest = options(sys.argv[1:])
    group = page_cache.join() if chosen.limit_share else None  # before anything is allocated
    harness.main(partial(measure, chosen, group), rest)
