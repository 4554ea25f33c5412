"""A memory file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_jax.memory.store.memory_file import write_memory
from tests.memory.store.files import ROWS
from tests.memory.store.tables import FORMATS, numbers


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
