"""Which of JAX's platforms this machine has, told without asking JAX, which would open them all."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os


def has_tpu_chips() -> bool:
    """Whether TPU chips are attached to this machine."""
    return bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def without_tpu() -> str:
    """The platforms to name to JAX where libtpu is installed without a TPU: "cpu", "cuda,cpu" or
    "rocm,cpu". "" where there is nothing to leave out, or a plugin is installed that this does not
    know."""
    if importlib.util.find_spec("libtpu") is None or has_tpu_chips():
        return ""
    found = []
    for plugin in importlib.metadata.entry_points(group="jax_plugins"):
        if "cuda" in plugin.name:
            found += ["cuda"] if os.path.exists("/dev/nvidiactl") else []
        elif "rocm" in plugin.name:
            found += ["rocm"] if os.path.exists("/dev/kfd") else []
        else:
            return ""
    return ",".join([*dict.fromkeys(found), "cpu"])
