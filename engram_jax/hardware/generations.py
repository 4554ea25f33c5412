"""TPU generations: memory, peak and shape of one device, with the sources of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Generation:
    """What does not depend on the slice.

    dimensions: of the torus, so of a slice's name.
    wrap_length, whole_cubes: a slice's dimension has wraparound links if it is a multiple of that;
      with whole_cubes, only if all dimensions are (below).
    devices_per_chip: JAX devices; a tpu7x chip shows as two, every other as one.
    hbm_bytes: of one device, what a program can use (below).
    flops: bfloat16 FLOP/s of one device, Google's published peak (below).
    device_kinds: `jax.Device.device_kind`, of a described device first; real ones may have another.
    """

    name: str
    dimensions: int
    wrap_length: int
    whole_cubes: bool
    devices_per_chip: int
    hbm_bytes: int
    flops: float
    device_kinds: tuple[str, ...]

    def wraps(self, size: Sequence[int]) -> tuple[bool, ...]:
        """Which dimensions of a slice of that size are rings: their ends are linked."""
        whole = [n % self.wrap_length == 0 for n in size]
        return (all(whole),) * len(whole) if self.whole_cubes else tuple(whole)


# hbm_bytes: libtpu 0.0.52 refuses a program as soon as memory_analysis().peak_memory_in_bytes +
# generated_code_size_in_bytes exceeds these, found by bisection to 8 KiB. It is what the runtime
# leaves of the chip's HBM; the message rounds it ("exceeds available HBM (15.75G)", then 95.73G,
# 31.24G and 94.74G).
# Wraparound links: in three dimensions slices are made of cubes of 4x4x4 chips joined by optical
# switches, and only whole cubes have them ("Slices smaller than a full cube are 3D connected,
# however, they don't have wrap-around links", cloud.google.com/tpu/docs/v5p; tpu7x, which has the
# same cubes, likewise).
# In two dimensions they are those of the pod of 16x16; libtpu refuses others ("All wrap-around
# dimensions must be of length 16").
# flops of a chip: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x): 197, 459, 918, 2307 TFLOP/s.
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v5e", 2, 16, False, 1, 16126 * MIB, 197e12, ("TPU v5 lite", "TPU v5e")),
        Generation("v5p", 3, 4, True, 1, 98025 * MIB, 459e12, ("TPU v5", "TPU v5p")),
        Generation("v6e", 2, 16, False, 1, 31992 * MIB, 918e12, ("TPU v6 lite", "TPU v6e")),
        Generation("tpu7x", 3, 4, True, 2, 97012 * MIB, 2307e12 / 2, ("TPU7x",)),
    )
}
