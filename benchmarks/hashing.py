"""Hashing speed: tokens to addresses, 2 layers x 16 heads at the 27B geometry.

    python -m benchmarks.hashing [--json PATH]

Three forms on the same canonical ids, all on the CPU: the plain NumPy formula as the public demo
writes it (int64, layer by layer, head by head), the data pipeline's, and the jitted exact 32-bit
one. They take turns within one run, so that whatever else the machine does meets all of them; a
turn is as many calls as fit into TURN_SECONDS. Medians over the turns are printed, and the ratio is
the median of the ratios within a round. The three are compared bit for bit first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.harness import Figure, Result
from engram_jax.addressing import Addressing, BatchAddresser, LayerAddressing, hash_jax, plan_layer
from engram_jax.config import EngramConfig

ENGRAM_27B = EngramConfig(layers=(1, 14), rows_per_head=(2_262_400,), d_mem=1280)
CANONICAL_VOCAB, PAD_ID = 98_627, 2
BATCH, LENGTH = 16, 4096
ROUNDS, TURN_SECONDS = 25, 0.05
PLAIN, PIPELINE, JITTED = "plain NumPy", "pipeline (NumPy)", "jitted exact (jnp)"


def plain_numpy(ids: np.ndarray, layers: Sequence[LayerAddressing]) -> list[np.ndarray]:
    """The formula as it is usually written: int64 [B, T, H] per layer, before head offsets."""
    ids = ids.astype(np.int64)
    length = ids.shape[1]
    found = []
    for layer in layers:
        shifted = [
            np.pad(ids, ((0, 0), (k, 0)), constant_values=layer.fill_id)[:, :length]
            for k in range(layer.max_ngram)
        ]
        sizes = iter(layer.head_sizes)
        heads = []
        for order in layer.orders:
            mix = shifted[0] * layer.multipliers[0]
            for k in range(1, order):
                mix = np.bitwise_xor(mix, shifted[k] * layer.multipliers[k])
            heads += [mix % next(sizes) for _ in range(layer.heads_per_order)]
        found.append(np.stack(heads, axis=2))
    return found


def measure() -> Result:
    """Time the three forms on [BATCH, LENGTH] ids."""
    layers = plan_layer(ENGRAM_27B, CANONICAL_VOCAB, fill_id=PAD_ID)
    ids = np.random.default_rng(0).integers(0, CANONICAL_VOCAB, (BATCH, LENGTH)).astype(np.int32)
    addressing = Addressing(None, CANONICAL_VOCAB, PAD_ID, layers, "paper", -1, "")
    pipeline = BatchAddresser(addressing)
    on_device = jax.device_put(ids, jax.devices("cpu")[0])
    jitted = jax.jit(lambda x: [hash_jax.addresses(x, layer) for layer in layers.values()])
    forms: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: plain_numpy(ids, list(layers.values())),
        PIPELINE: lambda: list(pipeline(ids).values()),
        JITTED: lambda: jax.block_until_ready(jitted(on_device)),
    }
    _check({name: form() for name, form in forms.items()}, list(layers.values()))

    calls = {name: max(1, round(TURN_SECONDS / _seconds(form, 3))) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            seconds[name].append(_seconds(form, calls[name]))

    figures = []
    for name, times in seconds.items():
        speed = BATCH * LENGTH / statistics.median(times) / 1e6
        jitted_form = name == JITTED
        figures.append(Figure(name, speed, "M tokens/s", at_least=15.0 if jitted_form else None))
        if name != PLAIN:
            times_plain = harness.ratio(seconds[PLAIN], times)
            bound = 8.0 if jitted_form else None
            figures.append(Figure("  to plain NumPy", times_plain, "x", at_least=bound))
    setting = (
        f"engram27b, 2 layers x 16 heads, {BATCH * LENGTH:,} tokens a call;"
        f" medians of {ROUNDS} interleaved rounds"
    )
    return Result("hashing", setting, figures, {"seconds": seconds})


def _seconds(form: Callable[[], Any], calls: int) -> float:
    """Mean wall time of one call."""
    start = time.perf_counter()
    for _ in range(calls):
        form()
    return (time.perf_counter() - start) / calls


def _check(found: dict[str, list[Any]], layers: Sequence[LayerAddressing]) -> None:
    for index, layer in enumerate(layers):
        expected = found[PLAIN][index] + np.array(layer.offsets)
        for name in (PIPELINE, JITTED):
            if not np.array_equal(expected, np.asarray(found[name][index])):
                raise AssertionError(f"layer {layer.layer_id}: {name} differs from {PLAIN}")


if __name__ == "__main__":
    harness.main(measure)
