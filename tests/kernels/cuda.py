"""Lowering for CUDA on a machine without a GPU."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

H100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")


def lowered_for_cuda(function, *args) -> str:
    """The program of function(*args), in which Pallas' kernels are Triton's."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
