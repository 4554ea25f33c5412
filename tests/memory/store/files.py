"""Memory files read, and their headers written, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROWS = 700


def read(path: Path) -> tuple[dict, int]:
    """Header and where the data begins, by hand."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def write_header(path: Path, entries: dict | str, data_bytes: int) -> None:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))


def gathered(source, ids) -> list[np.ndarray]:
    out = source.format.empty(len(ids))
    source.gather(np.asarray(ids), out)
    return list(out)
