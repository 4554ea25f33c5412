"""Checkpoints that are damaged, foreign or of another model are refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.addressing.artifact import Addressing
from engram_jax.checkpoint.integrity import OneLine
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.config.errors import UserError
from tests.checkpoint.states import assert_identical, assert_refused, make_state


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


def test_a_damaged_newest_checkpoint_says_how_to_go_on(workdir):
    folder = workdir / "checkpoints" / "30"
    spoil(folder / "meta" / "metadata", "truncated")
    assert_refused(workdir, None, make_state(0), f"; to go on from step 20, move {folder} away")
    folder.rename(workdir / "moved")
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert_identical(checkpointer.restore(None, make_state(0)).state, make_state(20))


def test_a_renamed_checkpoint_is_refused(workdir):
    (workdir / "checkpoints" / "30").rename(workdir / "checkpoints" / "50")
    words = "was written after step 30; its folder was renamed: call it 30 again"
    assert_refused(workdir, None, make_state(0), "checkpoints/50", words)


def test_orbaxs_own_notes_may_be_lost(workdir):
    folder = workdir / "checkpoints" / "30"
    lost = [path for path in (*folder.iterdir(), *(folder / "meta").iterdir()) if path.is_file()]
    lost = [path for path in lost if path.name != "metadata"]
    assert any(path.name == "_CHECKPOINT_METADATA" for path in lost)
    for path in lost:
        path.unlink()
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert_identical(checkpointer.restore(None, make_state(0)).state, make_state(30))


DISKS = [
    (OSError(28, "No space left on device"), "No space left on device; after making room"),
    (ValueError("RESOURCE_EXHAUSTED: x\n" * 9 + "No space left on device"), "No space left"),
    (ValueError("of\nmany\nlines"), "(ValueError: of)"),
    (OSError(30, "Read-only file system"), "Read-only file system"),
    (OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
    (ValueError("x" * 9000), "(ValueError: xxx"),
]


@pytest.mark.parametrize(("error", "words"), DISKS)
def test_what_a_save_fails_of_is_one_line_with_its_reason(error, words):
    with pytest.raises(UserError) as caught, OneLine("checkpoint 3: cannot be written"):
        raise error
    assert words in str(caught.value) and len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


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
