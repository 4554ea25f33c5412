"""Checkpoints that move: other meshes, other numbers of processes, and one that fails."""

from __future__ import annotations

import random
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts

from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError
from tests import moving


def one_device() -> jax.sharding.Mesh:
    return moving.make_mesh(jax.devices()[:1])


def assert_stored_by_true_rows(workdir: Path, step: int) -> None:
    """Read by Tensorstore alone: shape and bits, and no piece of an array beyond its bounds."""
    state = workdir / "checkpoints" / str(step) / "state"
    base = {"driver": "file", "path": f"{state}/"}
    keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    leaves = jax.tree_util.tree_flatten_with_path(moving.originals(step))[0]
    values = {moving.path_of(path): value for path, value in leaves if value.size}
    assert {key.decode().rsplit("/", 1)[0] for key in keys} == set(values)
    for name, value in values.items():
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        array = ts.open({"driver": "zarr", "kvstore": store}).result()
        assert array.shape == value.shape, name
        assert array.read().result().tobytes() == value.tobytes(), name
        grid = -(-np.array(value.shape) // np.array(array.chunk_layout.write_chunk.shape))
        pieces = [k for k in keys if k.startswith(f"{name}/".encode()) and b"zarray" not in k]
        assert len(pieces) == np.prod(grid, dtype=int), name


def test_eight_devices_to_four_to_one_and_back(tmp_path):
    moving.saved(tmp_path, one_device(), 1)
    assert_stored_by_true_rows(tmp_path, 1)
    actions = ("restore:1", "save:2", "restore:2", "restore:2:4", "restore:2:1", "layouts:2")
    assert moving.run(tmp_path, *actions) == [[str(moving.ITERATOR)] * 4]
    assert_stored_by_true_rows(tmp_path, 2)
    assert moving.restored(tmp_path, one_device(), 2) == moving.ITERATOR


def test_padding_is_asked_for_by_name(tmp_path):
    value = np.arange(12, dtype=np.float32).reshape(4, 3)
    state = {"memory": {"1": {"rows": jax.numpy.asarray(value)}}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, true_rows={"memory/1/rows": 3})
        with pytest.raises(UserError, match=r"memory/1/rows is float32\[3, 3\] there and .*4, 3\]"):
            checkpointer.restore(1, state)
        with pytest.raises(UserError, match=r"float32\[3, 3\] there and float32\[2, 3\] here"):
            checkpointer.restore(1, state, true_rows={"memory/1/rows": 2})
        for leaf in (state["memory"]["1"]["rows"], value):  # on the host, too
            target = {"memory": {"1": {"rows": leaf}}}
            found = checkpointer.restore(1, target, true_rows={"memory/1/rows": 3}).state
            assert type(found["memory"]["1"]["rows"]) is type(leaf)
            np.testing.assert_array_equal(found["memory"]["1"]["rows"][:3], value[:3])
            np.testing.assert_array_equal(found["memory"]["1"]["rows"][3:], 0)


@pytest.mark.parametrize("rows", [{"memory/2/rows": 3}, {"x": 5}, {"x": -1}, {"step": 0}])
def test_impossible_true_rows(tmp_path, rows):
    state = {"x": jax.numpy.ones((4, 2)), "step": jax.numpy.int32(0)}
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="true_rows"):
            checkpointer.save(1, state, true_rows=rows)
        assert checkpointer.steps() == []


def largest(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def test_two_processes_to_one_and_back(tmp_path):
    """And what is damaged is refused by both in the same words, whichever of them finds it."""
    moving.saved(tmp_path, one_device(), 1)
    names = []
    for step, name in ((11, "_METADATA"), (12, "")):
        moving.saved(tmp_path, one_device(), step)
        state = tmp_path / "checkpoints" / str(step) / "state"
        file = next(state.rglob(name)) if name else largest(state)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:-1] if step == 11 else data)
        names.append(str(file.relative_to(tmp_path)))
    damage = ("refused:11", "refused:12", "refused:13")
    actions = ("restore:1", "save:2", "restore:2", "save_different:3", "restore:3", *damage)
    ours, theirs = moving.run(tmp_path, *actions, processes=2, devices=2)
    assert ours[:2] == theirs[:2] == [str(moving.ITERATOR)] * 2
    assert (ours[2], theirs[2]) == ("{'rank': 0}", "{'rank': 1}")
    assert ours[3:] == theirs[3:]
    assert len(ours) == 6
    for message, name, word in zip(ours[3:5], names, ("bytes of", "altered"), strict=True):
        assert word in message and Path(name).name in message
        assert "complete checkpoints beside it: 1, 2, 3" in message
    assert "step 13 was asked for" in ours[5]

    assert_stored_by_true_rows(tmp_path, 2)
    assert moving.restored(tmp_path, one_device(), 2) == moving.ITERATOR
    message = moving.refused(tmp_path, one_device(), 3)
    assert "written by 2 processes, this run has 1" in message
    # Each file of either process is in the list, with its CRC.
    state = tmp_path / "checkpoints" / "2" / "state"
    for rank in (0, 1):
        file = largest(state / f"ocdbt.process_{rank}")
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert str(file.relative_to(state)) in moving.refused(tmp_path, one_device(), 2)
        file.write_bytes(data)


def test_a_process_that_cannot_write_ends_the_save_on_both(tmp_path):
    """Within seconds: Orbax alone would let the other one wait for 20 minutes."""
    actions = ("fails:1:1", "fails:2:0", "fails:3:commit")
    outputs = moving.run(tmp_path, *actions, processes=2, devices=1)
    for rank, lines in enumerate(outputs):
        for culprit, message in zip((1, 0, 0), lines, strict=True):
            assert f"checkpoints {tmp_path}/checkpoints: the last save failed" in message
            assert (f"process {culprit} of 2" in message) == (rank != culprit)
        assert "no space left" in lines[2]


def kill_while_saving(workdir: Path, rng: random.Random) -> None:
    """SIGKILL to one of two processes; the other one ends by itself."""
    children = moving.start(workdir, ["for_ever"], processes=2, devices=2)
    victim = rng.randrange(2)
    out = children[victim].stdout
    assert out is not None
    try:
        said = 0
        while said < 2:
            said = max([said, *map(int, moving.heard(out.readline()))])
        time.sleep(rng.uniform(0, 0.2))
        children[victim].kill()
        said = max([said, *map(int, moving.heard(out.read()))])
        assert children[1 - victim].wait(timeout=60) != 0
    finally:
        for child in children:
            child.kill()
            child.communicate()
    with Checkpointer(workdir, read_only=True) as checkpointer:
        steps = checkpointer.steps()
    assert steps[-1] >= said
    for step in steps:
        moving.restored(workdir, one_device(), step)
    moving.saved(workdir, one_device(), steps[-1] + 1)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {str(step) for step in (*steps, steps[-1] + 1)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_process_killed_while_saving_leaves_the_last_checkpoint(tmp_path, seed):
    kill_while_saving(tmp_path, random.Random(seed))
