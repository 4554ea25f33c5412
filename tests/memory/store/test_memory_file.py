"""Memory files: read by the safetensors library, written whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store import file_format as header_module
from engram_jax.memory.store import write_file
from engram_jax.memory.store.file_format import LayerHeader, block_rows, plan_tensors, to_bytes
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.xxh64 import xxh64
from tests.memory.store.files import ROWS, read
from tests.memory.store.tables import FORMATS, numbers, stored


def test_safetensors_reads_it(path):
    safetensors = pytest.importorskip("safetensors")
    tensors = dict(safetensors.deserialize(path.read_bytes()))
    kinds = {"float32": "F32", "bfloat16": "BF16", "fp8": "F8_E4M3"}
    for i, form in enumerate(FORMATS):
        parts = stored(form, numbers(form, ROWS, i))
        weight = tensors[f"layers.{i}.engram.embed.weight"]
        assert (weight["dtype"], weight["shape"]) == (kinds[form.name], [ROWS, form.dim])
        assert bytes(weight["data"]) == parts[0].tobytes()
        if form.name == "fp8":
            scale = tensors[f"layers.{i}.engram.embed.scale"]
            assert (scale["dtype"], scale["shape"]) == ("F8_E8M0", [ROWS, form.dim // 32])
            assert bytes(scale["data"]) == parts[1].tobytes()
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata()["fingerprint"] == "cafe" and opened.metadata()["step"] == "12"
        got = opened.get_tensor("layers.0.engram.embed.weight")
        np.testing.assert_array_equal(got, numbers(FORMATS[0], ROWS, 0))


def test_the_layout(path):
    head, start = read(path)
    assert start % 4096 == 0
    tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
    assert all(
        entry["data_offsets"][0] % 4096 == 0 for n, entry in tensors.items() if "pad" not in n
    )
    assert json.loads(head["__metadata__"]["layers"])["3"] == {
        "format": "fp8",
        "dim": 256,
        "block_rows": [16, 512],
    }
    # One checksum by hand: the last block of layer 3, rows 688 to 699.
    data = path.read_bytes()
    begin, end = (start + x for x in tensors["layers.3.engram.embed.weight"]["data_offsets"])
    sums = tensors["layers.3.engram.embed.weight.xxh64"]
    assert sums["dtype"] == "U64" and sums["shape"] == [44]
    last = start + sums["data_offsets"][1]
    assert int.from_bytes(data[last - 8 : last], "little") == xxh64(data[begin + 688 * 256 : end])


def test_opening_says_what_is_inside(path):
    opened = open_memory(path, "cafe")
    assert opened.layers == {str(i): (ROWS, form) for i, form in enumerate(FORMATS)}
    assert opened.fingerprint == "cafe" and opened.metadata["step"] == "12"
    with pytest.raises(UserError, match="has no layer '9'; it has 0, 1, 2, 3, 4"):
        opened.disk("9")
    with pytest.raises(UserError, match="resident part 'scale': must be one of weight"):
        opened.disk("0", ("scale",))


def test_another_addressing_is_refused(path):
    with pytest.raises(UserError, match="made for addressing cafe, this model has beef") as caught:
        open_memory(path, "beef")
    assert str(path) in str(caught.value)


def test_the_length_of_chunks_does_not_matter(path, tmp_path, monkeypatch):
    other = tmp_path / "other"
    monkeypatch.setattr(write_file, "_PIECE", 4 * 64 * 13)
    layers = {str(i): (form, ROWS, [numbers(form, ROWS, i)]) for i, form in enumerate(FORMATS)}
    write_memory(other, layers, "cafe", {"step": "12"})
    assert other.read_bytes() == path.read_bytes()


def leftovers(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


def test_a_failure_leaves_what_was_there(path):
    before = path.read_bytes()
    form = RowFormat("fp8", 64)

    def fails():
        yield numbers(form, 30)
        raise RuntimeError("no more")

    bad = numbers(form, 5)
    bad[3, 3] = np.nan
    cases = [
        (fails(), RuntimeError, "no more"),
        ([numbers(form, 9)], UserError, "layer 1: 60 rows were promised and only 9 came"),
        ([numbers(form, 61)], UserError, "60 rows were promised and more came"),
        ([numbers(form, 55), bad], UserError, r"layer 1, in the rows from 55 on: row 3: .*finite"),
        ([numbers(form, 60)[:, :32]], UserError, r"must be \[n, 64\]"),
    ]
    for chunks, kind, message in cases:
        with pytest.raises(kind, match=message):
            write_memory(path, {"1": (form, 60, chunks)}, "f", {})
        assert leftovers(path) == [path.name] and path.read_bytes() == before


def test_a_full_disk_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    form = RowFormat("float32", 64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"memory: cannot be written \(File too large\)"):
            write_memory(tmp_path / "memory", {"1": (form, 600, [numbers(form, 600)])}, "f", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match=r"cannot be written .No such file"):
        write_memory(tmp_path / "no" / "memory", {}, "f", {})


def test_names_and_metadata_are_checked(tmp_path):
    form = RowFormat("float32", 2)
    chunk = [np.zeros((1, 2), np.float32)]
    with pytest.raises(UserError, match="layer '1/2': a layer id must be letters and digits"):
        write_memory(tmp_path / "m", {"1/2": (form, 1, chunk)}, "f", {})
    with pytest.raises(UserError, match="layer 1: 0 rows, must be at least 1"):
        write_memory(tmp_path / "m", {"1": (form, 0, [])}, "f", {})
    for metadata in ({"version": "9"}, {"steps": 9}):
        with pytest.raises(UserError, match="must be strings, and the names format"):
            write_memory(tmp_path / "m", {"1": (form, 1, chunk)}, "f", metadata)
    with pytest.raises(UserError, match="the header would take"):
        write_memory(tmp_path / "m", {"1": (form, 1, chunk)}, "f", {"long": "x" * (1 << 20)})
    assert os.listdir(tmp_path) == []


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
def test_forty_gigabytes_open_at_once(tmp_path, path):
    """A sparse file: header and its checksum only. The code that gathers is loaded before memory is
    measured: it gathers from another file first."""
    rows = 150_000_000
    form = RowFormat("fp8", 256)
    open_memory(path, "cafe").disk("3").gather(np.array([0]), form.empty(1))
    layers = {"1": LayerHeader(form, rows, block_rows(form))}
    head = to_bytes(layers, "f", {})
    end = plan_tensors(layers)[header_module.HEADER_CHECKSUM].end
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + end)
        file.seek(len(head) + end - 8)
        file.write(xxh64(head[8:]).to_bytes(8, "little"))
    assert large.stat().st_size > 39e9
    before, began = resident_bytes(), time.perf_counter()
    source = open_memory(large, "f").disk("1")
    assert time.perf_counter() - began < 2
    with pytest.raises(UserError, match=r"block 9374999 \(rows 149999984 to 149999999\): damaged"):
        source.gather(np.array([rows - 1]), form.empty(1))
    assert resident_bytes() - before < 1.01 * 8 * (rows / 16 + rows / 512) + 5e6  # checksums
