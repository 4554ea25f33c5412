"""Which module reads the rows of an Engram layer, by `config.model.engram.form`."""

from __future__ import annotations

from typing import Any

from engram_jax.config import OVER_ENCODING, SCONE, ModelConfig
from engram_jax.layers.engram import Engram
from engram_jax.layers.fgram_embedding import FgramEmbedding
from engram_jax.layers.over_encoding import OverEncoding

MemoryModule = Engram | FgramEmbedding | OverEncoding


def memory_module(model: ModelConfig, **how: Any) -> MemoryModule:
    """A new module. how: dtype, param_dtype and rngs.

    All of them map (rows, streams, segments, mask, shard) to what is added to the streams, and
    gates.
    """
    d, engram = model.d_model, model.engram
    if engram.form == OVER_ENCODING:
        return OverEncoding(d, engram, init_std=model.init_std, **how)
    if engram.form == SCONE:
        return FgramEmbedding(engram.d_mem, d, init_std=model.init_std, **how)
    return Engram(
        d,
        model.hyper.streams,
        engram,
        norm_eps=model.norm_eps,
        init_std=model.init_std,
        kernels=model.kernels,
        **how,
    )
