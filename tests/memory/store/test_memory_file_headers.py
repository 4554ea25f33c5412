"""Memory files with wrong or hostile headers are refused in one line."""

from __future__ import annotations

import json
import os

import pytest

from engram_jax.config.errors import UserError
from engram_jax.memory.store.memory_file import open_memory
from tests.memory.store.files import read, write_header

WEIGHT = "layers.0.engram.embed.weight"


def test_missing_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        open_memory(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder"):
        open_memory(tmp_path)
    (tmp_path / "text").write_text("once upon a time" * 900)
    with pytest.raises(UserError, match="the header's length is"):
        open_memory(tmp_path / "text")
    os.truncate(path, 0)
    write_header(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8)
    with pytest.raises(UserError, match="a foreign file"):
        open_memory(path)


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
