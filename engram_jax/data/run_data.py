"""Opens a run's data: prepared.py's tokens as batches, with the addressing of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from engram_jax.addressing import Addressing, BatchAddresser, build_addressing, load_tokenizer
from engram_jax.addressing.tokenizer import check_encodes
from engram_jax.config import LOCAL_BPE, SCONE, Config
from engram_jax.config.errors import UserError
from engram_jax.data.fgram_counts import with_fgrams
from engram_jax.data.packing import Batch
from engram_jax.data.pipeline import AddressesFn, TrainIterator, train_batches, validation_batches
from engram_jax.data.placement import rows_here
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.data.train_bpe import find_eos
from engram_jax.distributed.consensus import agree, gather


@dataclass(frozen=True)
class RunData:
    """A run's prepared data. addressing: None for a model without memory."""

    config: Config
    prepared: PreparedData
    addressing: Addressing | None

    def train_iterator(self, mesh: Mesh | None = None) -> TrainIterator:
        """Endless batches; with addresses if config.model.engram.addresses is "host".

        mesh: only the rows that this process's devices hold (for `place_batch`); None = all.
        """
        rows = None if mesh is None else rows_here(mesh, self.config.data.batch_size)
        return train_batches(self.prepared, self.config, rows, self._addresses_fn())

    def validation_batches(
        self, mesh: Mesh | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        """The held-out batches in their fixed order, at most `limit`; mesh: as above."""
        rows = None if mesh is None else rows_here(mesh, self.config.data.batch_size)
        return validation_batches(self.prepared, self.config, rows, self._addresses_fn(), limit)

    def _addresses_fn(self) -> AddressesFn | None:
        if self.addressing is None or self.config.model.engram.addresses != "host":
            return None
        return BatchAddresser(self.addressing)


def open_data(
    config: Config, log: Callable[[str], None] = print, *, count_fgrams: bool = True
) -> RunData:
    """Prepare the text (cached) and derive the addressing. Raises UserError for unusable input.

    count_fgrams: whether the f-grams of form "scone" are those of this text; False: they are not
      known yet (`as_stored` reads a run's).

    A configured tokenizer is checked first: reading and tokenising the text can take hours.
    """
    check_tokenizer(config)
    prepared = prepare(config, log=log)
    addressing = (
        build_addressing(config, prepared.tokenizer) if config.model.engram.layers else None
    )
    if addressing is not None and config.model.engram.form == SCONE and count_fgrams:
        vocab = config.tokenizer.vocab_size
        addressing = with_fgrams(addressing, prepared.store_train, vocab, log)
    return RunData(config, prepared, addressing)


def open_on_all_processes(
    config: Config, log: Callable[[str], None] = print, *, count_fgrams: bool = True
) -> RunData:
    """`open_data` on every process, with the same result on all. Process 0 runs first, so that in a
    shared data.cache_dir the others find what it has prepared. Raises UserError on all of them."""
    first = jax.process_index() == 0
    mine = agree(lambda: open_data(config, log, count_fgrams=count_fgrams) if first else None)
    found = agree(lambda: mine or open_data(config, log, count_fgrams=count_fgrams))
    check_same_text(found)
    return found


def check_same_text(run_data: RunData) -> None:
    """Raises UserError unless all processes have prepared the same text with the same tokenizer."""
    found = gather(run_data.prepared.fingerprint)
    other = next((i for i, text in enumerate(found) if text != found[0]), None)
    if other is not None:
        raise UserError(
            f"config.data: the text or the tokenizer of process {other} is not that of process 0;"
            " give every host the same data.path and tokenizer.path (the embedded text is the"
            " standard library of each host's Python: give all the same version)"
        )


def check_tokenizer(config: Config) -> None:
    """Raises UserError unless the configured tokenizer exists, fits and compresses as recorded.

    This is checked for a model without memory, too, since it is compared with models that have one.
    """
    tokens = config.tokenizer
    if tokens.path:
        tokenizer = load_tokenizer(tokens.path)
        check_encodes(tokenizer, tokens.path)
        find_eos(tokenizer, tokens)
        build_addressing(config, tokenizer)
    elif tokens.name != LOCAL_BPE:
        raise UserError(
            f"config.tokenizer.path = '': must be the tokenizer.json of {tokens.name}, which this"
            f" configuration is made for (or set config.tokenizer.name={LOCAL_BPE} and"
            " config.tokenizer.canonical_vocab_size=0 to train one on the data)"
        )
