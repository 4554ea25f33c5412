"""Exports a checkpoint's tables as a memory file, and counts how often rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from engram_jax.addressing.hash_batches import BatchAddresser
from engram_jax.checkpoint.load_model import load_model
from engram_jax.config import HOST, Config
from engram_jax.config.errors import UserError
from engram_jax.config.given_files import check_output
from engram_jax.data.run_data import open_on_all_processes
from engram_jax.memory.store.memory_file import write_memory
from engram_jax.memory.store.read_counts import count_accesses, save_frequency
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.model.program import check_decodes
from engram_jax.serve.compatibility import origin

_CHUNK = 1 << 16  # rows
Log = Callable[[str], None]


def export_memory(
    config: Config,
    workdir: Path,
    step: str,
    path: Path,
    row_format: str,
    log: Log,
    accept: Sequence[str] = (),
) -> None:
    """Write a checkpoint's tables as a memory file (memory/store/file_format.py).

    row_format: "float32", "bfloat16", "fp8", or "" = the tables' dtype. accept: keys or sections of
    `config` that may differ from what the run was trained with. Needs host memory for the
    tables, none on the device. Raises UserError for a model without memory.
    """
    if not config.model.engram.layers:
        raise UserError("config.model.engram.layers = (): has no memory to export")
    check_decodes(config)
    check_output("output", path)
    trained = load_model(config, workdir, step, rows=HOST, accept=accept)
    stored = RowFormat(row_format or config.model.engram.table_dtype, config.model.engram.dim)
    addressing = trained.program.addressing
    assert addressing is not None
    layers = {
        layer: (stored, len(rows), _chunks(np.asarray(rows)))
        for layer, rows in trained.weights.rows.items()
    }
    write_memory(path, layers, addressing.fingerprint, origin(trained))
    total = sum(rows for _, rows, _ in layers.values())
    log(f"{path}: {total:,} rows of {stored.dim} as {stored.name}, {path.stat().st_size:,} bytes")


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


def count_memory(config: Config, path: Path, tokens: int, log: Log) -> None:
    """Write a frequency file: how often the first `tokens` training tokens read each row. Raises
    UserError for a model without memory."""
    if not config.model.engram.layers:
        raise UserError("config.model.engram.layers = (): has no memory whose reads to count")
    check_decodes(config)
    check_output("output", path)
    data = open_on_all_processes(config, log=log)
    assert data.addressing is not None
    addresser = BatchAddresser(data.addressing)
    seen = 0

    def batches() -> Iterator[dict[str, np.ndarray]]:
        nonlocal seen
        for batch in data.train_iterator():
            if seen >= tokens:
                return
            segments = np.asarray(batch["segments"])
            found = addresser(np.asarray(batch["tokens"]), segments)
            real = segments > 0  # padding reads nothing
            seen += int(real.sum())
            yield {layer: ids[real] for layer, ids in found.items()}

    rows = {str(k): layer.padded_rows for k, layer in data.addressing.layers.items()}
    layers = count_accesses(batches(), rows)
    save_frequency(path, layers, data.addressing.fingerprint, seen)
    for layer, found in layers.items():
        share = len(found.ids) / found.rows
        log(f"layer {layer}: {found.lookups:,} lookups read {share:.1%} of {found.rows:,} rows")
    log(f"{path}: counted over {seen:,} tokens")
