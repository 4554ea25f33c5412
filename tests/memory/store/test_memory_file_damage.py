"""Memory files that are damaged, or change while they are open: no wrong row is ever served."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store import file_table
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.row_format import RowFormat
from tests.memory.store.files import ROWS, gathered, read
from tests.memory.store.tables import FORMATS, numbers, stored


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def everything(path: Path, how: str) -> None:
    """Read every row of every layer."""
    opened = open_memory(path)
    for layer, (rows, form) in opened.layers.items():
        if how == "host":
            opened.host(layer)
        else:
            opened.disk(layer).gather(np.arange(rows), form.empty(rows))


@pytest.mark.parametrize("how", ["host", "disk"])
def test_one_changed_byte_in_any_tensor_is_noticed(path, how):
    head, start = read(path)
    everything(path, how)
    names = [name for name in head if name != "__metadata__"]
    assert len(names) > 20
    for name in names:
        begin, end = head[name]["data_offsets"]
        for at in {begin, end - 1, (begin + end) // 2}:
            flip(path, start + at)
            with pytest.raises(UserError) as caught:
                everything(path, how)
            flip(path, start + at)
            message = str(caught.value)
            assert str(path) in message and "damaged" in message and "\n" not in message
            if name.startswith("layers") and "padding" not in name:
                layer, tensor = name.split(".")[1], name.removesuffix(".xxh64")
                assert f"layer {layer}, tensor {tensor}, block" in message
    everything(path, how)


def test_only_the_rows_of_a_damaged_block_are_lost(path):
    head, start = read(path)
    flip(path, start + head["layers.3.engram.embed.weight"]["data_offsets"][0] + 256 * 37 + 9)
    source, form = open_memory(path).disk("3"), FORMATS[3]
    fine = np.r_[0:32, 48:ROWS]
    out = form.empty(fine.size)
    source.gather(fine, out)
    np.testing.assert_array_equal(out[0], stored(form, numbers(form, ROWS, 3))[0][fine])
    for row in (32, 47):
        with pytest.raises(UserError, match=r"block 2 \(rows 32 to 47\): damaged"):
            source.gather(np.array([0, row, 600]), form.empty(3))


@pytest.mark.parametrize("at", range(8, 3000, 97))
def test_a_changed_header_is_noticed(path, at):
    flip(path, at)
    with pytest.raises(UserError) as caught:
        open_memory(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [0, 5, 8, 100, 4095, 4096, 40_000, -1])
def test_truncated_files_are_refused(path, left):
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(UserError, match=r"no usable memory file: .*(short|length|truncated)"):
        open_memory(path)


def test_a_file_with_more_at_its_end_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"too long: .* bytes of data, the header says"):
        open_memory(path)


def test_a_file_that_shrinks_while_open_is_refused(path):
    source = open_memory(path).disk("0")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="changed its size while open"):
        source.gather(np.array([1]), FORMATS[0].empty(1))


@pytest.fixture
def other(path, tmp_path) -> Path:
    """A whole file of the same size: of every layer, rows 0 to 399 are others."""
    target, layers = tmp_path / "other", {}
    for i, form in enumerate(FORMATS):
        rows = np.r_[numbers(form, 400, 77 + i), numbers(form, ROWS, i)[400:]]
        layers[str(i)] = (form, ROWS, [rows])
    write_memory(target, layers, "cafe", {"step": "13"})
    assert target.stat().st_size == path.stat().st_size
    return target


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
def test_rows_copied_over_an_open_file_are_never_served(path, other, layer):
    """cp writes into the file that is open: its new rows come with fitting new checksums."""
    form, first = FORMATS[layer], path.read_bytes()
    wanted = stored(form, numbers(form, ROWS, layer))
    source, everyone = open_memory(path).disk(str(layer)), np.arange(ROWS)
    path.write_bytes(other.read_bytes())
    for row in (0, 399):
        with pytest.raises(UserError) as caught:
            gathered(source, [row])
        message = str(caught.value)
        assert str(path) in message and "was changed while the file was open" in message
        assert f"layer {layer}, tensor" in message and "\n" not in message
    with pytest.raises(UserError, match="was changed while the file was open"):
        gathered(source, everyone)
    if layer != 2:  # whose scales are all in one block
        for got, part in zip(gathered(source, everyone[512:]), wanted, strict=True):
            np.testing.assert_array_equal(got, part[512:])
    path.write_bytes(first)  # what was opened is there again
    for got, part in zip(gathered(source, everyone), wanted, strict=True):
        np.testing.assert_array_equal(got, part)


def test_a_file_that_is_replaced_by_renaming_is_read_on(path, other):
    source = open_memory(path).disk("3")
    os.replace(other, path)
    wanted = stored(FORMATS[3], numbers(FORMATS[3], ROWS, 3))
    for got, part in zip(gathered(source, np.arange(ROWS)), wanted, strict=True):
        np.testing.assert_array_equal(got, part)


@pytest.mark.parametrize("how", ["host", "disk"])
def test_a_file_that_changes_while_it_is_opened_is_refused(path, other, how):
    """The header that was looked at would speak of other rows."""
    opened = open_memory(path, "cafe")
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="was changed while it was opened"):
        getattr(opened, how)("1")


def test_a_file_that_is_cut_short_within_a_call(path, monkeypatch):
    """After it has been looked at: a mapped file would end the process."""
    source = open_memory(path).disk("4")
    os.truncate(path, 4096)
    monkeypatch.setattr(file_table.OpenFile, "check_size", lambda self: None)
    with pytest.raises(UserError) as caught:
        gathered(source, np.arange(ROWS))
    message = str(caught.value)
    assert message.startswith(f"{path}: ends at byte") and "block 0 (rows 0 to 0)" in message


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads Linux' /proc")
def test_a_read_error_is_an_error_of_the_call():
    """Address 4,096 of a process is not there to be read, which this file calls an I/O error."""
    file = file_table.OpenFile(FileIO("/proc/self/mem", "rb"))
    part = file_table.StoredPart("t", 4096, 100, 64, np.zeros(2, np.uint64), 64)
    source = file_table.DiskTable(
        RowFormat("float32", 16), [part], file=file, layer="1", resident={}
    )
    with pytest.raises(UserError) as caught:
        gathered(source, [70, 3])
    assert str(caught.value) == (
        "/proc/self/mem: cannot be read at byte 4096 (Input/output error); in layer 1, tensor t,"
        " block 0 (rows 0 to 63)"
    )
