"""The data pipeline: from text to documents, tokens on disk, and packed batches on the mesh."""

from engram_jax.data.pipeline import AddressesFn, TrainIterator, train_batches, validation_batches
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.data.source_report import SourceReport

__all__ = [
    "AddressesFn",
    "PreparedData",
    "SourceReport",
    "TrainIterator",
    "prepare",
    "train_batches",
    "validation_batches",
]
