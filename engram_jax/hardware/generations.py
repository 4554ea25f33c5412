"""TPU generations: memory, speeds and shape of one device, with the sources of the figures."""

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
    hbm_bandwidth: of one device, bytes/s.
    flops: bfloat16 FLOP/s of one device, Google's published peak (below).
    clock: of its matrix units, Hz: the unit of libtpu's estimates of cycles (below).
    axis_bandwidth: bytes/s that a chip receives over one axis of the torus, from both neighbours.
    device_kinds: `jax.Device.device_kind`, of a described device first; real ones may have another.
    """

    name: str
    dimensions: int
    wrap_length: int
    whole_cubes: bool
    devices_per_chip: int
    hbm_bytes: int
    hbm_bandwidth: float
    flops: float
    clock: float
    axis_bandwidth: float
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
# flops and hbm_bandwidth of a chip: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x): 197, 459,
# 918, 2307 TFLOP/s and 819, 2765, 1640, 7380 GB/s.
# clock: the one at which a device's matrix units make the peak, flops / (2 x units x side^2),
# rounded to 10 MHz: v5e 4 units of 128x128 (jax-ml.github.io/scaling-book/tpus names 1.5 GHz, too),
# v5p 8 of 128x128, v6e and tpu7x 4 of 256x256. Google's page says two units for v6e; with four,
# libtpu's estimate of a product of 4096^3 is 1.15 times its arithmetic (v5e, v5p, tpu7x: 1.03,
# 1.04, 1.24), with two it would be 0.58.
# axis_bandwidth: "bidirectional ICI bandwidth per link" of the same book. tpu7x: an assumption, as
# v5p, since both have 1200 GB/s per chip, in both directions, over three axes (cloud.google.com).
GENERATIONS = {
    g.name: g
    for g in (
        Generation(
            name="v5e",
            dimensions=2,
            wrap_length=16,
            whole_cubes=False,
            devices_per_chip=1,
            hbm_bytes=16126 * MIB,
            hbm_bandwidth=819e9,
            flops=197e12,
            clock=1.5e9,
            axis_bandwidth=9e10,
            device_kinds=("TPU v5 lite", "TPU v5e"),
        ),
        Generation(
            name="v5p",
            dimensions=3,
            wrap_length=4,
            whole_cubes=True,
            devices_per_chip=1,
            hbm_bytes=98025 * MIB,
            hbm_bandwidth=2765e9,
            flops=459e12,
            clock=1.75e9,
            axis_bandwidth=1.8e11,
            device_kinds=("TPU v5", "TPU v5p"),
        ),
        Generation(
            name="v6e",
            dimensions=2,
            wrap_length=16,
            whole_cubes=False,
            devices_per_chip=1,
            hbm_bytes=31992 * MIB,
            hbm_bandwidth=1640e9,
            flops=918e12,
            clock=1.75e9,
            axis_bandwidth=1.8e11,
            device_kinds=("TPU v6 lite", "TPU v6e"),
        ),
        Generation(
            name="tpu7x",
            dimensions=3,
            wrap_length=4,
            whole_cubes=True,
            devices_per_chip=2,
            hbm_bytes=97012 * MIB,
            hbm_bandwidth=7380e9 / 2,
            flops=2307e12 / 2,
            clock=2.2e9,
            axis_bandwidth=1.8e11,
            device_kinds=("TPU7x",),
        ),
    )
}
