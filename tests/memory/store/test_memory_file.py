"""Memory files: read by the safetensors library, refused when anything about them is wrong."""

from __future__ import annotations

import json
import os
import resource
import time
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store import file_format as header_module
from engram_jax.memory.store import file_table, write_file
from engram_jax.memory.store.file_format import LayerHeader, block_rows, plan_tensors, to_bytes
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.xxh64 import xxh64
from tests.memory.store.tables import FORMATS, numbers, stored

ROWS = 700


@pytest.fixture
def path(tmp_path) -> Path:
    """Layers 0 to 4, one of each format, 700 rows."""
    target = tmp_path / "memory.safetensors"
    layers = {
        str(i): (form, ROWS, np.array_split(numbers(form, ROWS, i), [1, 1, 400, 555]))
        for i, form in enumerate(FORMATS)
    }
    write_memory(target, layers, "cafe", {"step": "12"})
    return target


def read(path: Path) -> tuple[dict, int]:
    """Header and where the data begins, by hand."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


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


def gathered(source, ids) -> list[np.ndarray]:
    out = source.format.empty(len(ids))
    source.gather(np.asarray(ids), out)
    return list(out)


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


def test_missing_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        open_memory(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        open_memory(tmp_path)
    (tmp_path / "text").write_text("once upon a time" * 900)
    with pytest.raises(UserError, match="the header's length is"):
        open_memory(tmp_path / "text")
    os.truncate(path, 0)
    write_header(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8)
    with pytest.raises(UserError, match="a foreign file"):
        open_memory(path)


def write_header(path: Path, entries: dict | str, data_bytes: int) -> None:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))


WEIGHT = "layers.0.engram.embed.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": [-8, 16792]}, "numbers from 0 on"),
        ({"data_offsets": [0, 2**70]}, "numbers from 0 on"),
        ({"data_offsets": [0.0, 16800]}, "numbers from 0 on"),
        ({"data_offsets": [16800, 0]}, "data_offsets span -16800"),
        ({"data_offsets": [4, 16804]}, "leaves a gap before it"),
        ({"shape": [-700, -6]}, "the shape must be"),
        ({"shape": [True, 4200]}, "the shape must be"),
        ({"shape": [700, 3, 2]}, "the shape must be"),
        ({"shape": [2**61, 2**61]}, "data_offsets span"),
        ({"shape": [699, 6]}, "takes 16776 bytes, data_offsets span 16800"),
        ({"shape": [600, 7]}, "must be F32"),
        ({"dtype": "F16"}, "dtype 'F16', must be one of"),
        ({"dtype": ["F32"]}, "must be one of"),
        ({"dtype": "BF16", "shape": [700, 12]}, "must be F32 "),
        ({"extra": 1}, "must have dtype, shape and data_offsets"),
    ],
)
def test_hostile_entries_are_refused(path, changes, message):
    head, start = read(path)
    head[WEIGHT].update(changes)
    size = path.stat().st_size
    write_header(path, head, size - start)
    with pytest.raises(UserError) as caught:
        open_memory(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("name", "value"), [("dim", 6.0), ("block_rows", [170.0])])
def test_a_fraction_in_the_layers_description_is_refused(path, name, value):
    """6.0 is equal to 6, but no number of columns: rows could not be read."""
    head, start = read(path)
    described = json.loads(head["__metadata__"]["layers"])
    assert described["0"][name] == value
    described["0"][name] = value
    head["__metadata__"]["layers"] = json.dumps(described)
    write_header(path, head, path.stat().st_size - start)
    with pytest.raises(UserError, match="dim and block_rows must be whole numbers"):
        open_memory(path)


def test_overlapping_tensors_are_refused(path):
    head, start = read(path)
    head[WEIGHT + ".copy"] = head[WEIGHT]
    write_header(path, head, path.stat().st_size - start)
    with pytest.raises(UserError, match="overlaps the one before"):
        open_memory(path)


def test_a_further_tensor_and_a_missing_one_are_refused(path):
    head, start = read(path)
    size = path.stat().st_size - start
    head["more"] = {"dtype": "U8", "shape": [3], "data_offsets": [size, size + 3]}
    write_header(path, head, size + 3)
    with pytest.raises(UserError, match=r"tensor more: U8 \[3\] at \d+, must be absent"):
        open_memory(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "no valid JSON"),
        ("{", "no valid JSON"),
        ("[]", "no JSON object"),
        ('{"a": 1, "a": 2}', "a name occurs twice"),
        ('{"__metadata__": 3}', "no object of strings"),
        ('{"__metadata__": {"format": 3}}', "no object of strings"),
        ('{"__metadata__": {"format": "engram_jax memory", "version": "2"}}', "version '2', this"),
        ('{"__metadata__": {"format": "engram_jax memory", "version": "1"}}', "no fingerprint"),
        (
            '{"__metadata__": {"format": "engram_jax memory", "version": "1", "fingerprint": "",'
            ' "layers": "[1]"}}',
            "does not describe the tensors",
        ),
    ],
)
def test_hostile_json_is_refused(tmp_path, text, message):
    path = tmp_path / "hostile"
    write_header(path, text, 0)
    with pytest.raises(UserError) as caught:
        open_memory(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 1 << 21])
def test_an_absurd_length_of_the_header_is_refused(path, length):
    with path.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    with pytest.raises(UserError, match=f"the header's length is {length}: must be 2 to"):
        open_memory(path)


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
