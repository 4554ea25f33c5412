"""TPU generations: memory, peak and shape of one device, with the sources of the figures."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Generation:
    """What does not depend on the slice.

    dimensions: of the torus, so of a slice's name.
    devices_per_chip: JAX devices; a tpu7x chip shows as two, every other as one.
    hbm_bytes: of one device, what a program can use (below).
    flops: bfloat16 FLOP/s of one device, Google's published peak (below).
    device_kinds: `jax.Device.device_kind`, of a described device first; real ones may have another.
    """

    name: str
    dimensions: int
    devices_per_chip: int
    hbm_bytes: int
    flops: float
    device_kinds: tuple[str, ...]


# hbm_bytes: libtpu 0.0.52 refuses a program as soon as memory_analysis().peak_memory_in_bytes +
# generated_code_size_in_bytes exceeds these, found by bisection to 8 KiB. It is what the runtime
# leaves of the chip's HBM; the message rounds it ("exceeds available HBM (15.75G)", then 95.73G,
# 31.24G and 94.74G).
# flops of a chip: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x): 197, 459, 918, 2307 TFLOP/s.
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v5e", 2, 1, 16126 * MIB, 197e12, ("TPU v5 lite", "TPU v5e")),
        Generation("v5p", 3, 1, 98025 * MIB, 459e12, ("TPU v5", "TPU v5p")),
        Generation("v6e", 2, 1, 31992 * MIB, 918e12, ("TPU v6 lite", "TPU v6e")),
        Generation("tpu7x", 3, 2, 97012 * MIB, 2307e12 / 2, ("TPU7x",)),
    )
}
