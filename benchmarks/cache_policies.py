"""Which rows a cache should keep: policies on real text, against the optimum.

    python -m benchmarks.cache_policies --json=benchmarks/results/cache_policies.json

Documents in random order; the first 60 % fill every cache (and are counted, for the static one),
hits are counted on the rest. Two traces: decoding, 64 streams of text that advance by a token each
step, and prefill, 2,048 tokens at a time. One head of each order stands for its eight, which are
read alike, and every cache has an eighth of its size. A row counts once per step. The drawing goes
beside the JSON file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Figure, Result, table, write_json
from benchmarks.text_addresses import Text, open_text

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
ROWS_PER_HEAD, HEADS = 2_262_400, slice(0, None, 8)
STREAMS, PREFILL, HISTORY = 64, 2_048, 0.6


def traces(text: Text):
    """{name: trace}, and the frequencies of the first part."""
    from engram_jax.memory.store.cache_policies import record
    from engram_jax.memory.store.read_counts import AccessCounter

    order = np.random.default_rng(0).permutation(len(text.starts) - 1)
    cut = int(len(order) * HISTORY)
    first, rest = text.documents(order[:cut]), text.documents(order[cut:])
    counter = AccessCounter(text.rows)

    def hashed(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([a[:, HEADS] for a in text.addresses(tokens)])

    before, after = hashed(first), hashed(rest)
    counter.add(before)

    def lanes(addresses: np.ndarray) -> list[np.ndarray]:
        steps = len(addresses) // STREAMS
        apart = addresses[: steps * STREAMS].reshape(STREAMS, steps, -1)
        return [apart[:, step].reshape(-1) for step in range(steps)]

    def chunks(addresses: np.ndarray) -> list[np.ndarray]:
        return [addresses[i : i + PREFILL].reshape(-1) for i in range(0, len(addresses), PREFILL)]

    found = {}
    for name, cut_up in (("decode", lanes), ("prefill", chunks)):
        history = cut_up(before)
        found[name] = record([*history, *cut_up(after)], since=len(history))
    return found, counter.frequency()


def measure() -> Result:
    from engram_jax.memory.store import cache_policies

    text = open_text(ROWS_PER_HEAD)
    found, frequency = traces(text)
    sample = text.rows // 8
    policies = {
        "static": lambda trace, size: cache_policies.static(trace, size, frequency.ids),
        **cache_policies.ONLINE,
        "static, knows the trace": cache_policies.static_best,
        "Belady, the optimum": cache_policies.belady,
    }
    figures, rates, seconds = [], {}, {}
    for kind, trace in found.items():
        for name, simulate in policies.items():
            began = time.perf_counter()
            rates[f"{kind}, {name}"] = [
                simulate(trace, max(1, int(share * sample))) / trace.lookups for share in SHARES
            ]
            seconds[f"{kind}, {name}"] = time.perf_counter() - began
            print(kind, name, [f"{100 * r:.1f}" for r in rates[f"{kind}, {name}"]], flush=True)
        for at, share in enumerate(SHARES):
            others = ", ".join(
                f"{name} {100 * rates[f'{kind}, {name}'][at]:.1f}"
                for name in policies
                if name != "sets"
            )
            ours = 100 * rates[f"{kind}, sets"][at]
            figures.append(
                Figure(f"{kind}: hits, {100 * share:g} % of the rows", ours, "%", note=others)
            )
    details = {
        "shares": SHARES,
        "rates": rates,
        "simulation_seconds": seconds,
        "lookups": {kind: trace.lookups for kind, trace in found.items()},
        "distinct": {kind: len(trace.rows) for kind, trace in found.items()},
        "rows": sample,
    }
    return Result(
        "cache_policies", f"{text.name}; {ROWS_PER_HEAD:,} rows per head", figures, details
    )


def draw(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for ax, kind in zip(axes, ("decode", "prefill"), strict=True):
        for name, rates in result.details["rates"].items():
            if name.startswith(kind):
                label = name.removeprefix(kind + ", ")
                style = "k--" if "Belady" in label else ("k:" if "knows" in label else "o-")
                width = 2.5 if label == "sets" else 1.3
                shares = [100 * share for share in result.details["shares"]]
                ax.plot(shares, [100 * r for r in rates], style, label=label, lw=width, ms=4)
        ax.set(xscale="log", xlabel="rows in the cache, % of the table", title=kind)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("lookups that hit, %")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there, too")
    options = parser.parse_args()
    outcome = measure()
    print(table(outcome), flush=True)
    if options.json:
        write_json(options.json, [outcome])
        draw(outcome, options.json.with_suffix(".png"))
