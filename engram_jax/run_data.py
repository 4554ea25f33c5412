"""The data of a run with the addressing that belongs to its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from engram_jax import data
from engram_jax.address import Addressing, BatchAddresser, build, load_tokenizer
from engram_jax.config import LOCAL_BPE, Config
from engram_jax.data.packing import Batch
from engram_jax.errors import UserError


@dataclass(frozen=True)
class RunData:
    """addressing: None for a model without memory."""

    config: Config
    prepared: data.PreparedData
    addressing: Addressing | None

    def train_iterator(self) -> data.TrainIterator:
        """This process's endless batches; with addresses if the host is to hash."""
        return data.train_iterator(
            self.prepared,
            self.config,
            jax.process_index(),
            jax.process_count(),
            self._addresses_fn(),
        )

    def validation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """The held-out batches in their fixed order, at most `limit`."""
        return data.validation_batches(
            self.prepared,
            self.config,
            jax.process_index(),
            jax.process_count(),
            self._addresses_fn(),
            limit,
        )

    def _addresses_fn(self) -> data.AddressesFn | None:
        if self.addressing is None or self.config.model.engram.addresses != "host":
            return None
        return BatchAddresser(self.addressing)


def open_data(config: Config, log: Callable[[str], None] = print) -> RunData:
    """Prepare the text (cached) and derive the addressing. Raises UserError for unusable input.

    A tokenizer that is given is checked first: reading and tokenising the text can take hours.
    """
    check_tokenizer(config)
    prepared = data.prepare(config, log=log)
    addressing = build(config, prepared.tokenizer) if config.model.engram.layers else None
    return RunData(config, prepared, addressing)


def check_tokenizer(config: Config) -> None:
    """Raises UserError unless the configured tokenizer is there, fits and compresses as recorded.

    So it must for a model without memory, too: it is compared with those that have one.
    """
    tokens = config.tokenizer
    if tokens.path:
        build(config, load_tokenizer(tokens.path))
    elif tokens.name != LOCAL_BPE:
        raise UserError(
            f"config.tokenizer.path = '': must be the tokenizer.json of {tokens.name}, which this"
            f" configuration is made for (or set config.tokenizer.name={LOCAL_BPE} and"
            " config.tokenizer.canonical_vocab_size=0 to train one on the data)"
        )
