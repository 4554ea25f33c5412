"""Checkpoints: what comes back is what went in, whatever happens to a run or a disk."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.addressing.artifact import Addressing
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def make_state(seed: int) -> dict:
    """A small state with every kind of leaf a run has."""
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "blocks": [
                {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)},
                {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16)},
            ]
        },
        "memory": {"1": (jnp.asarray(rng.normal(size=(60, 4)), jnp.float32),)},
        "router": jnp.zeros((0, 8), jnp.float32),
        "host": rng.integers(0, 1 << 40, size=7),
        "step": jnp.int32(seed),
    }


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_refused(workdir: Path, step, abstract, *words: str, addressing=None) -> str:
    """Restoring raises one line that names the checkpoint and the reason."""
    with Checkpointer(workdir, addressing=addressing, read_only=True) as checkpointer:
        with pytest.raises(UserError) as caught:
            checkpointer.restore(step, abstract)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(workdir / "checkpoints"), *words):
        assert word in message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with steps 10, 20 and 30; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpointer(workdir) as checkpointer:
        for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
            checkpointer.save(
                step,
                make_state(step),
                iterator={"position": step},
                metrics={"loss": loss},
                metadata={"tokens": 7 * step},
            )
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize(("step", "expected"), [(None, 30), (10, 10), ("best", 20)])
def test_restores_bit_for_bit(saved, step, expected):
    with Checkpointer(saved, read_only=True) as checkpointer:
        found = checkpointer.restore(step, make_state(0))
    assert found.step == expected
    assert_identical(found.state, make_state(expected))
    assert found.iterator == {"position": expected}
    assert found.metadata == {"tokens": 7 * expected}
    assert found.metrics["loss"] == {10: 2.0, 20: 1.0, 30: 3.0}[expected]


def test_the_digest_is_of_one_save(saved, tmp_path):
    """A copy has the same. Other numbers, another step and the same saved again have others."""

    def digest(workdir: Path, step: int) -> str:
        with Checkpointer(workdir, read_only=True) as checkpointer:
            return checkpointer.restore(step, make_state(0)).digest

    def saved_again(name: str, step: int, seed: int) -> str:
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(
                step,
                make_state(seed),
                iterator={"position": 10},
                metrics={"loss": 2.0},
                metadata={"tokens": 70},
            )
        return digest(tmp_path / name, step)

    found = {digest(saved, step) for step in (10, 20, 30)}
    copied = shutil.copytree(saved, tmp_path / "copied")
    assert {digest(copied, step) for step in (10, 20, 30)} == found
    found |= {saved_again("same", 10, 10), saved_again("seed", 10, 11), saved_again("step", 11, 10)}
    assert len(found) == 6 and {len(each) for each in found} == {64}


def test_restores_onto_abstract_arrays(saved):
    expected = make_state(30)
    abstract = {k: jax.eval_shape(lambda v=v: v) for k, v in expected.items() if k != "host"}
    with Checkpointer(saved, read_only=True) as checkpointer:
        found = checkpointer.restore(30, {**abstract, "host": expected["host"]}).state
    assert_identical(found, expected)


def test_iterator_bytes_survive(tmp_path):
    state = bytes(range(256))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(1)}, iterator=state)
        assert checkpointer.restore(1, {"x": jnp.ones(1)}).iterator == state


def test_buffers_may_be_donated_and_overwritten_at_once(tmp_path):
    step = jax.jit(lambda table: table + 1, donate_argnums=0)
    table = step(jnp.zeros((200_000, 32)))  # 25 MB: the files take longer than the steps below
    host = np.full((1000, 1000), 5.0)
    abstract = {"table": jax.ShapeDtypeStruct(table.shape, table.dtype), "host": host.copy()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"table": table, "host": host})
        host[:] = -1
        for _ in range(5):
            table = step(table)
        table.block_until_ready()
        found = checkpointer.restore(1, abstract).state
    assert np.all(np.asarray(table) == 6)
    assert np.all(np.asarray(found["table"]) == 1)
    assert np.all(found["host"] == 5)


def test_keeps_the_latest_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 3.0}
    state = {"x": jnp.ones(2)}

    def save(steps):
        with Checkpointer(tmp_path, keep=2, keep_best=1) as checkpointer:
            for step in steps:
                metrics = {} if losses[step] is None else {"loss": losses[step]}
                assert checkpointer.save(step, state, metrics=metrics)
            return checkpointer.steps(), checkpointer.best_step()

    assert save((1, 2, 3, 4)) == ([2, 3, 4], 2)
    assert save((5, 6)) == ([2, 5, 6], 2)  # a second process knows the losses from the files
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]


def test_a_step_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, {"x": jnp.ones(2)})
        assert not checkpointer.save(3, {"x": jnp.zeros(2)})
        assert np.all(checkpointer.restore(3, {"x": jnp.zeros(2)}).state["x"] == 1)


def test_no_checkpoint_at_all(tmp_path, saved):
    with pytest.raises(UserError, match="nothing was saved there"):
        Checkpointer(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.best_step() is None
        with pytest.raises(UserError, match="the latest step was asked for; there is none"):
            checkpointer.restore(None, {})
    message = assert_refused(saved, 11, {}, "step 11 was asked for", "there are steps 10, 20, 30")
    assert "whole" not in message


def test_opening_to_restore_changes_nothing(workdir):
    partial = workdir / "checkpoints" / "40.orbax-checkpoint-tmp"
    partial.mkdir()
    before = sorted(workdir.rglob("*"))
    with Checkpointer(workdir, read_only=True) as checkpointer:
        checkpointer.restore(None, make_state(0))
        with pytest.raises(UserError, match="to restore only"):
            checkpointer.save(50, make_state(50))
    assert sorted(workdir.rglob("*")) == before
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(50, make_state(50))
    assert not partial.exists()


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "altered"])
def test_every_damaged_file_is_named_and_refused(workdir, how):
    """Every file that holds something; Orbax's own notes beside them may be lost."""
    latest = workdir / "checkpoints" / "30"
    files = [*(latest / "state").rglob("*"), latest / "meta" / "metadata"]
    files = [f for f in files if f.is_file() and f.name != "commit_success.txt"]
    assert len(files) >= 8
    for file in files:
        data = file.read_bytes()
        spoil(file, how)
        name = str(file.relative_to(latest)) if file.name != "files.json" else "state/"
        assert_refused(workdir, None, make_state(0), "checkpoints/30", name, "beside it: 10, 20")
        file.write_bytes(data)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert_identical(checkpointer.restore(None, make_state(0)).state, make_state(30))


def test_damaged_older_checkpoints_are_not_offered(workdir):
    spoil(workdir / "checkpoints" / "30" / "meta" / "metadata", "truncated")
    spoil(next((workdir / "checkpoints" / "20" / "state" / "d").iterdir()), "truncated")
    assert_refused(
        workdir, None, make_state(0), "checkpoints/30", "complete checkpoints beside it: 10"
    )
    assert_refused(workdir, 20, make_state(0), "checkpoints/20", "bytes of", "beside it: 10")


def test_foreign_directories_are_refused(workdir):
    (workdir / "checkpoints" / "40").mkdir()
    (workdir / "checkpoints" / "40" / "model.safetensors").write_bytes(b"weights")
    (workdir / "checkpoints" / "notes").mkdir()
    assert_refused(workdir, None, make_state(0), "checkpoints/40", "no checkpoint of this project")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s["memory"].update({"1": (jnp.zeros((61, 4)),)}),
            ("memory/1/0", "[60, 4]", "[61, 4]"),
        ),
        (lambda s: s.update(step=jnp.float32(0)), ("step is int32[] there and float32[] here",)),
        (lambda s: s.pop("host"), ("host is int64[7] there and absent here",)),
        (lambda s: s.update(new=jnp.ones(1)), ("new is absent there and float32[1] here",)),
        (lambda s: s["params"].update(blocks=[]), ("params/blocks/0/w", "1 more arrays")),
    ],
)
def test_another_model_is_refused(saved, change, words):
    state = make_state(0)
    change(state)
    assert_refused(saved, None, state, "checkpoints/30", "belongs to another model", *words)


def addressing(pad_id: int) -> Addressing:
    return Addressing(
        compression=np.arange(10, dtype=np.int32),
        canonical_vocab_size=10,
        pad_id=pad_id,
        layers={},
        dialect="paper",
        eos_id=-1,
        tokenizer_fingerprint="test",
    )


def test_another_addressing_is_refused_with_both_fingerprints(tmp_path):
    mine, other = addressing(0), addressing(1)
    state = {"x": jnp.ones(2)}
    with Checkpointer(tmp_path, addressing=mine) as checkpointer:
        checkpointer.save(1, state)
    with Checkpointer(tmp_path, addressing=mine, read_only=True) as checkpointer:
        assert checkpointer.restore(1, state).step == 1
    for read_only in (False, True):
        with pytest.raises(UserError) as caught:
            Checkpointer(tmp_path, addressing=other, read_only=read_only)
        assert mine.fingerprint in str(caught.value)
        assert other.fingerprint in str(caught.value)
    assert_refused(tmp_path, 1, state, "checkpoints/1", mine.fingerprint, "none")
    # The folder beside the checkpoints was exchanged, too: each checkpoint knows its own.
    shutil.rmtree(tmp_path / "addressing")
    with pytest.raises(UserError, match="holds no addressing"):
        Checkpointer(tmp_path, addressing=other, read_only=True)
    other.save(tmp_path / "addressing")
    assert_refused(tmp_path, 1, state, mine.fingerprint, other.fingerprint, addressing=other)


def test_a_run_without_checkpoints_is_bound_to_no_addressing(tmp_path):
    for pad_id in (0, 1):  # the first launch ended before it had saved anything
        with Checkpointer(tmp_path, addressing=addressing(pad_id)):
            pass
    with Checkpointer(tmp_path, addressing=addressing(0), read_only=True) as checkpointer:
        with pytest.raises(UserError, match="there is none"):
            checkpointer.restore(None, {})


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
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
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


def test_a_relative_workdir_is_as_good(tmp_path, monkeypatch):
    """Orbax itself refuses relative paths, in the background, two saves later."""
    monkeypatch.chdir(tmp_path)
    state = make_state(4)
    with Checkpointer("runs/one") as checkpointer:
        checkpointer.save(4, state)
        checkpointer.save(5, state)
    with Checkpointer(Path("runs/one"), read_only=True) as checkpointer:
        assert checkpointer.steps() == [4, 5]
        assert_identical(checkpointer.restore(5, state).state["memory"], state["memory"])
