"""The header of a memory file: read as written, and refused with one line when it is not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_jax.config.errors import UserError
from engram_jax.memory.store.file_format import (
    RESERVED,
    LayerHeader,
    block_rows,
    parse_header,
    plan_tensors,
    to_bytes,
)
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.row_format import RowFormat
from tests.memory.store.tables import numbers
from tests.properties import examples

formats = st.builds(
    RowFormat, st.sampled_from(["float32", "bfloat16"]), st.integers(1, 5000)
) | st.integers(1, 40).map(lambda groups: RowFormat("fp8", 32 * groups))
headers = st.builds(
    lambda form, rows: LayerHeader(form, rows, block_rows(form)), formats, st.integers(1, 10**9)
)
layers = st.dictionaries(st.integers(0, 99).map(str), headers, min_size=1, max_size=4)
metadata = st.dictionaries(st.text().filter(lambda key: key not in RESERVED), st.text(), max_size=4)


@examples(80)
@given(layers=layers, fingerprint=st.text(), metadata=metadata)
def test_what_is_written_is_read(layers, fingerprint, metadata):
    data = to_bytes(layers, fingerprint, metadata)
    length = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + length and len(data) % 4096 == 0
    planned = plan_tensors(layers)
    end = max(tensor.end for tensor in planned.values())
    found = parse_header(data[8:], end)
    assert found.layers == layers and list(found.layers) == list(layers)
    assert found.tensors == planned
    assert found.metadata["fingerprint"] == fingerprint
    assert metadata.items() <= found.metadata.items()
    for other in (end - 1, end + 1):
        with pytest.raises(ValueError, match="bytes of data, the header says"):
            parse_header(data[8:], other)


FORMS = {"1": RowFormat("float32", 3), "14": RowFormat("fp8", 32)}
ROWS = 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(path to write to, the bytes of a good file, bytes before its data)."""
    path = tmp_path_factory.mktemp("header") / "memory"
    write_memory(path, {k: (f, ROWS, [numbers(f, ROWS)]) for k, f in FORMS.items()}, "cafe", {})
    data = path.read_bytes()
    return path, data, 8 + int.from_bytes(data[:8], "little")


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_memory(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_any_changed_byte_of_the_header_is_noticed(whole):
    path, data, start = whole
    text_end = len(data[:start].rstrip())

    @examples(400)
    @given(at=st.integers(0, text_end) | st.integers(0, start - 1), change=st.integers(1, 255))
    def check(at, change):
        refused(path, data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])

    check()


def test_any_truncated_file_is_refused(whole):
    path, data, start = whole

    @examples(200)
    @given(left=st.integers(0, start) | st.integers(0, len(data) - 1))
    def check(left):
        refused(path, data[:left])

    check()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(tree, path=()):
    """Where there is a value in nested objects and lists."""
    yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def changed(tree, path, value):
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


def test_any_other_value_anywhere_is_a_value_error_or_no_change(whole):
    """Also in the layers' description, which is JSON within JSON. What is accepted is what the file
    holds, of the types that the rest of the program computes with."""
    _, data, start = whole
    entries = json.loads(data[8:start])
    described = json.loads(entries["__metadata__"]["layers"])
    good = parse_header(data[8:start], len(data) - start)

    def check_text(tree):
        try:
            found = parse_header(json.dumps(tree).encode(), len(data) - start)
        except ValueError:
            return
        assert found.layers == good.layers and found.tensors == good.tensors
        for head in found.layers.values():
            assert type(head.format.dim) is int
            assert all(type(rows) is int for rows in head.block_rows)

    @examples(400)
    @given(at=st.sampled_from(list(places(entries))), value=values)
    def check(at, value):
        check_text(changed(entries, at, value))

    @examples(400)
    @given(
        at=st.sampled_from(list(places(described))),
        value=values | st.sampled_from([32.0, 3.0, 1e400, float("nan"), True, 2**4000]),
    )
    def check_description(at, value):
        text = json.dumps(changed(described, at, value))
        check_text(changed(entries, ("__metadata__", "layers"), text))

    check()
    check_description()
