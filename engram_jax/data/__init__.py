"""Floor 1: text -> documents -> tokenizer -> token store -> packed batches (Grain)."""

from engram_jax.data.pipeline import AddressesFn, TrainIterator
from engram_jax.data.prepared import PreparedData, prepare, train_iterator, validation_batches
from engram_jax.data.report import SourceReport

__all__ = [
    "AddressesFn",
    "PreparedData",
    "SourceReport",
    "TrainIterator",
    "prepare",
    "train_iterator",
    "validation_batches",
]
