"""XLA's compiler options per TPU generation and for CPUs, each with its reason.

Passed as `jax.jit(..., compiler_options=options_of(mesh))`: they belong to one program and need no
environment variable. Only what changes the compiled program is here (libtpu 0.0.52; a small
program with every collective beside independent matrix products, compiled with and without).
"""

from __future__ import annotations

import os

from jax.sharding import Mesh

from engram_jax.hardware.generations import GENERATIONS

# The exchange of rows: an all-to-all holds the chip up unless it is split into start and done,
# between which the scheduler then puts independent work. Off by default on every generation; a v5e
# of many chips refuses it ("Async all-to-all not supported on limited ICI").
_ASYNC_ALL_TO_ALL = {"xla_tpu_enable_async_all_to_all": True}

# lax.ragged_dot of bfloat16, forward and both gradients, as a kernel of exactly the FLOPs needed.
# By default it is a dense product of every row with every expert: 8 times the FLOPs with 8 experts
# on a chip. A v5p takes the kernel without it; the option changes nothing there.
_RAGGED_DOT_KERNEL = {"xla_tpu_enable_ragged_dot_kernel": True}

# Matrix products by Eigen instead of YNNPACK, which keeps the reductions: YNNPACK uses one core for
# products of less than 1,024 rows or in batches, and its threads wait for one another where other
# operations run beside it. With both, the demo's step takes up to a fifth longer (2 cores, jax
# 0.10.2: benchmarks/cpu_step.py). For training alone: on an EPYC that has AVX2 and no more, Eigen
# multiplies one or two rows that are left of groups of six in another way than the others, so a
# row's last bits depend on where it stands, and a served sequence's on what runs beside it.
_EIGEN_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

CPU = "cpu"  # a CPU's device kind

OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "v5e": {**_RAGGED_DOT_KERNEL},
    "v5p": {**_ASYNC_ALL_TO_ALL},
    "v6e": {**_ASYNC_ALL_TO_ALL, **_RAGGED_DOT_KERNEL},
    "tpu7x": {**_ASYNC_ALL_TO_ALL, **_RAGGED_DOT_KERNEL},
}

# In addition, of programs that update parameters.
TRAINING: dict[str, dict[str, bool | int | str]] = {CPU: {**_EIGEN_PRODUCTS}}

# Accepted but without effect, so not set: xla_tpu_enable_latency_hiding_scheduler (on by default),
# xla_tpu_enable_async_collective_fusion, its _fuse_all_gather, _fuse_all_reduce,
# _fuse_reduce_scatter and _multiple_steps, xla_tpu_overlap_compute_collective_tc,
# xla_enable_async_all_gather, xla_enable_async_all_reduce and
# xla_tpu_enable_data_parallel_all_reduce_opt.


def options_for(generation: str | None, *, training: bool = False) -> dict[str, bool | int | str]:
    """The compiler options for "v5e", "v5p", "v6e", "tpu7x" or "cpu"; none for anything else (an
    accelerator that libtpu does not compile for), whose compiler would refuse them."""
    name = generation or ""
    return {**OPTIONS.get(name, {}), **(TRAINING.get(name, {}) if training else {})}


def options_of(mesh: Mesh, *, training: bool = False) -> dict[str, bool | int | str]:
    """The compiler options for a mesh's devices, real or described, without those that the user
    has set in XLA_FLAGS or LIBTPU_INIT_ARGS, which they would override.

    training: of a program that updates parameters.
    """
    kind = mesh.devices.flat[0].device_kind
    named = (g.name for g in GENERATIONS.values() if kind in g.device_kinds)
    options = options_for(CPU if kind == CPU else next(named, None), training=training)
    said = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    return {name: value for name, value in options.items() if name not in said}
