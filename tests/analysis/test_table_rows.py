"""Values and norms of rows, and rows that are alike, against loops over the table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.analysis import table_rows
from engram_jax.analysis.row_readers import head_of
from engram_jax.analysis.table_rows import nearest_rows, read_rows, row_norms
from tests.tiny import tiny


@pytest.fixture(scope="module")
def given():
    """(program, tables, layer); some rows are zero."""
    program, state = tiny()
    layer = program.addressing.layers[1]
    rows = np.array(state.memory["1"].rows)
    rows[layer.offsets[1] : layer.offsets[1] + 3] = 0
    return program, {"1": dataclasses.replace(state.memory["1"], rows=rows)}, layer


@pytest.mark.parametrize("block", [5, 1 << 14])
def test_rows_norms_and_neighbours(given, block, monkeypatch):
    monkeypatch.setattr(table_rows, "ROWS", block)
    program, memory, layer = given
    table = np.asarray(memory["1"].rows, np.float64)
    asked = np.array([3, 0, 77, 3])
    np.testing.assert_array_equal(read_rows(program, memory, 1, asked), table[asked].astype("f4"))
    norms = np.sqrt((table**2).sum(axis=1))[: layer.rows]
    np.testing.assert_allclose(row_norms(program, memory, 1), norms, rtol=1e-5)
    for row in (0, layer.offsets[1] + 7, layer.rows - 1):
        head = head_of(layer, row)
        low, high = layer.offsets[head], layer.offsets[head] + layer.head_sizes[head]
        cosines = {
            other: table[row] @ table[other] / (norms[row] * norms[other])
            for other in range(low, high)
            if other != row and norms[other] > 0
        }
        best = sorted(cosines, key=lambda other: -cosines[other])
        rows, found = nearest_rows(program, memory, 1, row, most=4)
        assert rows.tolist() == best[:4]
        np.testing.assert_allclose(found, [cosines[other] for other in best[:4]], atol=1e-5)
        assert len(nearest_rows(program, memory, 1, row, most=999)[0]) == len(cosines)
    zero = layer.offsets[1]
    assert len(nearest_rows(program, memory, 1, zero)[0]) == 0
