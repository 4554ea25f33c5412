"""A state on any mesh, and a program that saves and restores it in processes of its own.

    python tests/moving.py WORKDIR RANK PROCESSES PORT ACTION...

runs the actions in order, on all devices there are. Everything is compared with NumPy arrays whose
bits are random, so that NaNs of every kind and negative zeros are among them.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.checkpoint import orbax_internals, save_barrier
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError
from tests.xla_flags import cpu_flags

BFLOAT16 = np.dtype(jax.numpy.bfloat16)
ROOT = Path(__file__).resolve().parent.parent
AXES = ("data", "fsdp", "expert", "tensor")
SIZES = {1: (1, 1, 1, 1), 2: (1, 2, 1, 1), 4: (1, 2, 2, 1), 8: (2, 2, 1, 2)}
# 3 rows on 8 devices: five of them hold nothing but padding.
TRUE_ROWS = {
    "memory/1/rows": 101,
    "memory/1/mu": 101,
    "memory/1/nu": 101,
    "memory/14/rows": 37,
    "memory/20/rows": 3,
}
ITERATOR = {"next_batch": 7, "data": "fingerprint", "seed": 3}


def originals(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def bits(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(rng.bytes(size), dtype).reshape(shape)

    return {
        "memory": {
            "1": {k: bits((101, 6), np.float32) for k in ("rows", "mu", "nu")},
            "14": {"rows": bits((37, 4), BFLOAT16)},
            "20": {"rows": bits((3, 5), np.float32)},
        },
        "params": {
            "experts": bits((4, 8, 6), np.float32),
            "norm": bits((5,), BFLOAT16),
            "w": bits((8, 16), np.float32),
        },
        "counts": bits((8, 3), np.int32),
        "halted": np.array(False),
        "none": np.zeros((0, 8), np.float32),
        "step": np.array(seed, np.int32),
    }


SPECS = {
    "params/experts": P("expert", "fsdp", "tensor"),
    "params/w": P(("data", "fsdp"), "tensor"),
    "counts": P("data"),
}


SAID = "said: "  # Gloo, too, writes to standard output


def say(what: object) -> None:
    print(f"{SAID}{what}", flush=True)


def heard(out: str) -> list[str]:
    return [line.removeprefix(SAID) for line in out.splitlines() if line.startswith(SAID)]


def path_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices).reshape(SIZES[len(devices)]), AXES)


def placed(name: str, value: np.ndarray, mesh: Mesh) -> tuple[tuple[int, ...], NamedSharding]:
    """The shape and the sharding a leaf has on a mesh."""
    if name in TRUE_ROWS:
        rows = -(-len(value) // mesh.size) * mesh.size
        return (rows, *value.shape[1:]), NamedSharding(mesh, P(AXES))
    return value.shape, NamedSharding(mesh, SPECS.get(name, P()))


def state_on(mesh: Mesh, seed: int) -> dict:
    def place(path: tuple, value: np.ndarray) -> jax.Array:
        shape, sharding = placed(path_of(path), value, mesh)
        padded = np.zeros(shape, value.dtype)
        padded[tuple(slice(n) for n in value.shape)] = value
        return jax.make_array_from_callback(shape, sharding, lambda index: padded[index])

    return jax.tree_util.tree_map_with_path(place, originals(seed))


def abstract_on(mesh: Mesh) -> dict:
    def describe(path: tuple, value: np.ndarray) -> jax.ShapeDtypeStruct:
        shape, sharding = placed(path_of(path), value, mesh)
        return jax.ShapeDtypeStruct(shape, value.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(describe, originals(0))


def check(found: dict, mesh: Mesh, seed: int) -> None:
    """Every bit that lies on this process's devices, and that the padding is zero."""

    def compare(path: tuple, leaf: jax.Array, value: np.ndarray) -> None:
        name = path_of(path)
        shape, sharding = placed(name, value, mesh)
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape, value.dtype, sharding), name
        padded = np.zeros(shape, value.dtype)
        padded[tuple(slice(n) for n in value.shape)] = value
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == padded[shard.index].tobytes(), name

    jax.tree_util.tree_map_with_path(compare, found, originals(seed))


def restored(workdir: Path, mesh: Mesh, step: int) -> object:
    """The iterator of a checkpoint whose arrays `check` finds right."""
    with Checkpointer(workdir, read_only=True) as checkpointer:
        found = checkpointer.restore(step, abstract_on(mesh), true_rows=TRUE_ROWS)
    check(found.state, mesh, step)
    return found.iterator


def with_layouts(workdir: Path, mesh: Mesh, step: int) -> None:
    """The same onto prescribed layouts."""
    for order in ((0, 1), (1, 0)):
        abstract = abstract_on(mesh)
        table = abstract["memory"]["1"]["rows"]
        abstract["memory"]["1"]["rows"] = jax.ShapeDtypeStruct(
            table.shape, table.dtype, sharding=Format(Layout(order), table.sharding)
        )
        with Checkpointer(workdir, read_only=True) as checkpointer:
            state = checkpointer.restore(step, abstract, true_rows=TRUE_ROWS).state
        assert state["memory"]["1"]["rows"].format.layout.major_to_minor == order
        check(state, mesh, step)


def saved(workdir: Path, mesh: Mesh, step: int, iterator: object = ITERATOR) -> None:
    with Checkpointer(workdir, keep=100) as checkpointer:
        checkpointer.save(step, state_on(mesh, step), true_rows=TRUE_ROWS, iterator=iterator)


def refused(workdir: Path, mesh: Mesh, step: int) -> str:
    try:
        restored(workdir, mesh, step)
    except UserError as error:
        return str(error)
    return "not refused"


def fails(workdir: Path, mesh: Mesh, step: int, where: str) -> str:
    """What is said of a save that fails on one process; afterwards, that the next one succeeds.

    where: rank of the process that may write only small files, or "commit": process 0 fails when
      all have written.
    """
    kept, crop = resource.getrlimit(resource.RLIMIT_FSIZE), orbax_internals.crop
    big = NamedSharding(mesh, P(AXES))
    noise = np.random.default_rng(0).normal(size=(mesh.size, 40_000)).astype(np.float32)
    state = {"x": jax.make_array_from_callback(noise.shape, big, lambda index: noise[index])}
    checkpointer = Checkpointer(workdir, keep=100)
    if where == "commit":
        orbax_internals.crop = out_of_space  # what else a commit does cannot be made to fail
    elif jax.process_index() == int(where):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, kept[1]))
    may_go = save_barrier._may_go
    # The others learn late that process 0 has let them go, when it may be at the next save.
    save_barrier._may_go = lambda name: time.sleep(0.3) or may_go(name)
    start = time.monotonic()
    try:
        checkpointer.save(step, state)
        checkpointer.wait()
        message = "not refused"
    except UserError as error:
        message = str(error)
    assert time.monotonic() - start < 60  # seconds, not the 20 minutes of a timeout
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    orbax_internals.crop = crop
    save_barrier._may_go = may_go
    assert step not in checkpointer.steps()
    checkpointer.save(step, state)
    checkpointer.close()
    assert step in checkpointer.steps()
    return message


def out_of_space(*_: object) -> None:
    raise OSError("no space left")


def for_ever(workdir: Path, mesh: Mesh) -> None:
    """Saves as fast as possible; says each step whose checkpoint is complete."""
    with Checkpointer(workdir, keep=2) as checkpointer:
        for step in range(1, 10_000):
            checkpointer.save(step, state_on(mesh, step), true_rows=TRUE_ROWS)
            if step > 1:
                say(step - 1)


def main(workdir: str, rank: str, processes: str, port: str, *actions: str) -> None:
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            num_processes=int(processes),
            process_id=int(rank),
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=20,
        )
    folder = Path(workdir)
    for action in actions:
        name, *numbers = action.split(":")
        mesh = make_mesh(jax.devices())
        if name == "layouts":
            with_layouts(folder, mesh, int(numbers[0]))
        elif name == "for_ever":
            for_ever(folder, mesh)
        elif name == "save_different":
            saved(folder, mesh, int(numbers[0]), {"rank": int(rank)})
        elif name == "save":
            saved(folder, mesh, int(numbers[0]))
        elif name == "restore":
            devices = jax.devices()[: int(numbers[1])] if numbers[1:] else jax.devices()
            say(restored(folder, make_mesh(devices), int(numbers[0])))
        elif name == "refused":
            say(refused(folder, mesh, int(numbers[0])))
        else:
            say(fails(folder, mesh, int(numbers[0]), numbers[1]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    workdir: Path, actions: Sequence[str], processes: int = 1, devices: int = 8
) -> list[subprocess.Popen]:
    """The processes, `devices` to each."""
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_flags(f"--xla_force_host_platform_device_count={devices}"),
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (workdir, rank, processes, port, *actions))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def run(
    workdir: Path, *actions: str, processes: int = 1, devices: int = 8, limit: float = 300
) -> list[list[str]]:
    """What each process said, by lines. Fails if one fails, or does not end in `limit` s."""
    children = start(workdir, actions, processes, devices)
    try:
        outputs = [child.communicate(timeout=limit) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, err) in zip(children, outputs, strict=True):
        assert child.returncode == 0, err
        assert "Traceback" not in err, err
    return [heard(out) for out, _ in outputs]


if __name__ == "__main__":
    main(*sys.argv[1:])
