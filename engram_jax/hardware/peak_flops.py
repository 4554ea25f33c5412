"""Peak FLOP/s of a device, by the name JAX gives it: the denominator of MFU."""

from __future__ import annotations

from engram_jax.hardware.generations import GENERATIONS

# jax.Device.device_kind -> dense bfloat16 FLOP/s of one device, without sparsity. A TPU device is a
# chip, but a 7x chip shows as two. NVIDIA's are from its data sheets, halved where they print the
# figure "with sparsity".
PEAK_BF16_FLOPS: dict[str, float] = {
    **{kind: g.flops for g in GENERATIONS.values() for kind in g.device_kinds},
    "TPU v4": 275e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device; None for a CPU and for what is not in the table."""
    return PEAK_BF16_FLOPS.get(device_kind)
