"""Checkpoints of killed, failing and several processes, and on other devices."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from engram_jax.checkpoint.manager import Checkpointer
from tests.checkpoint.states import assert_identical, assert_refused, make_state
from tests.xla_flags import cpu_flags

ROOT = Path(__file__).resolve().parents[2]


def kill_worker(workdir: str, said) -> None:
    """Resume, then save as fast as possible until killed; says each step whose `save` returned."""
    checkpointer = Checkpointer(workdir, keep=2, keep_best=1)
    latest = checkpointer.latest_step() or 0
    if latest:
        assert_identical(checkpointer.restore(None, make_state(0)).state, make_state(latest))
    for step in range(latest + 1, latest + 10_000):
        checkpointer.save(step, make_state(step), metrics={"loss": step * 7 % 5})
        said.send(step)


def kill_rounds(workdir: Path, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "orbax.checkpoint", "engram_jax.checkpoint.manager"])
    latest = 0
    for _ in range(rounds):
        hear, said = context.Pipe(duplex=False)
        process = context.Process(target=kill_worker, args=(str(workdir), said))
        process.start()
        said.close()
        returned = 0
        while returned < latest + 2:
            returned = hear.recv()  # EOFError if the worker failed
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        try:
            while True:
                returned = hear.recv()
        except EOFError:
            pass
        with Checkpointer(workdir, read_only=True) as checkpointer:
            # `save` returns after the previous checkpoint is complete.
            assert checkpointer.latest_step() >= max(returned - 1, latest)
            latest = checkpointer.latest_step()
            for step in checkpointer.steps():
                assert_identical(checkpointer.restore(step, make_state(0)).state, make_state(step))
    assert latest >= rounds  # every launch went on where the one before was killed
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(latest + 1, make_state(0))
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {str(step) for step in checkpointer.steps()}  # nothing half-written stays


def test_kill_at_any_moment_leaves_the_last_checkpoint(tmp_path):
    kill_rounds(tmp_path, rounds=4, seed=0)


@pytest.mark.slow
@pytest.mark.proof
def test_kill_many_times(tmp_path):
    kill_rounds(tmp_path, rounds=40, seed=1)


def run_python(code: str, *args: object, devices: int = 1) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": cpu_flags(f"--xla_force_host_platform_device_count={devices}"),
    }
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_a_failed_write_is_one_line_and_leaves_the_older_checkpoint(tmp_path):
    """A full disk, played by a limit on the size of files."""
    code = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError
checkpointer = Checkpointer(sys.argv[1])
state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(300, 1000)))}
checkpointer.save(1, state)
checkpointer.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
checkpointer.save(2, state)
try:
    checkpointer.wait()
except UserError as error:
    print(error)
print(checkpointer.steps())
"""
    message, steps = run_python(code, tmp_path).splitlines()
    assert str(tmp_path) in message
    assert "the last save failed" in message
    assert steps == "[1]"


def test_restores_onto_other_shardings(tmp_path):
    code = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from engram_jax.checkpoint.manager import Checkpointer
values = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
rows = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))
both = NamedSharding(jax.make_mesh((2, 2), ("a", "b")), P(("b"), "a"))
one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, {"table": jax.device_put(values, rows)})
    for sharding in (rows, both, one):
        abstract = {"table": jax.ShapeDtypeStruct((64, 6), jnp.float32, sharding=sharding)}
        found = checkpointer.restore(1, abstract).state["table"]
        assert found.sharding == sharding
        assert np.array_equal(found, values)
        for shard in found.addressable_shards:
            assert np.array_equal(shard.data, values[shard.index])
print("same")
"""
    assert run_python(code, tmp_path, devices=4) == "same\n"


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
workdir, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from engram_jax.checkpoint.manager import Checkpointer
values = np.arange(80, dtype=np.float32).reshape(20, 4)
sharding = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
table = jax.make_array_from_callback((20, 4), sharding, lambda index: values[index])
with Checkpointer(workdir) as checkpointer:
    checkpointer.save(1, {"table": table}, iterator=b"x" * (3 + rank))
    found = checkpointer.restore(1, {"table": table})
    assert found.iterator == b"x" * (3 + rank)
    for shard in found.state["table"].addressable_shards:
        assert np.array_equal(shard.data, values[shard.index])
print("same")
"""


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_python, TWO_PROCESSES, tmp_path, port, rank) for rank in (0, 1)]
        assert all(run.result().endswith("same\n") for run in runs)
    table = {"table": jnp.zeros((20, 4))}
    assert_refused(tmp_path, 1, table, "written by 2 processes, this run has 1")
