"""Exports a checkpoint's tables as a memory file, and counts how often rows are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from engram_jax.addressing.artifact import as_stored
from engram_jax.addressing.hash_batches import BatchAddresser
from engram_jax.checkpoint.load_model import check_same_tokenizer, load_model
from engram_jax.checkpoint.workdir import TOKENIZER
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


def count_memory(
    config: Config, path: Path, tokens: int, log: Log, workdir: Path | None = None
) -> None:
    """Write a frequency file: how often the first `tokens` training tokens read each row.

    workdir: of the run that is to be served. If there is one, its tokenizer is used, whose ids the
    text may not give again, and its f-grams.
    Raises UserError for a model without memory, and for a tokenizer that is not the run's.
    """
    if not config.model.engram.layers:
        raise UserError("config.model.engram.layers = (): has no memory whose reads to count")
    check_decodes(config)
    check_output("output", path)
    of_run = workdir is not None and (workdir / TOKENIZER).is_file()
    if workdir is not None and of_run:
        check_same_tokenizer(config, workdir)
        own = dataclasses.replace(config.tokenizer, path=str((workdir / TOKENIZER).absolute()))
        config = dataclasses.replace(config, tokenizer=own)
        log(f"counting with the tokenizer of the run in {workdir}")
    data = open_on_all_processes(config, log=log, count_fgrams=not of_run)
    assert data.addressing is not None
    addressing = data.addressing if workdir is None else as_stored(data.addressing, workdir)
    addresser = BatchAddresser(addressing)
    iterator, seen = data.train_iterator(), 0

    def batches() -> Iterator[dict[str, np.ndarray]]:
        nonlocal seen
        for batch in iterator:
            if seen >= tokens:
                return
            segments = np.asarray(batch["segments"])
            found = addresser(np.asarray(batch["tokens"]), segments)
            real = segments > 0  # padding reads nothing
            seen += int(real.sum())
            yield {layer: ids[real] for layer, ids in found.items()}

    rows = {str(k): layer.padded_rows for k, layer in addressing.layers.items()}
    with closing(iterator):
        layers = count_accesses(batches(), rows)
    save_frequency(path, layers, addressing.fingerprint, seen)
    for layer, found in layers.items():
        share = len(found.ids) / found.rows
        log(f"layer {layer}: {found.lookups:,} lookups read {share:.1%} of {found.rows:,} rows")
    log(f"{path}: counted over {seen:,} tokens")
