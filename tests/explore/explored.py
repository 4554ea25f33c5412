"""A model with random weights and a tokenizer that knows every byte, explored; over HTTP, too."""

from __future__ import annotations

import contextlib
import json
import threading
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import jax.tree_util
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_jax.addressing import build_addressing, same_tokenizer
from engram_jax.analysis.row_readers import RowReaders
from engram_jax.analysis.usage import count_ngrams
from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.explore.app import App
from engram_jax.explore.explorer import Explorer
from engram_jax.explore.training_text import Counted, TrainingText
from engram_jax.model.program import build_program
from engram_jax.serve.compatibility import with_capacity
from engram_jax.serve.http.responses import Limits
from tests.serve.web import Answer, Client, served
from tests.tiny import tiny_config

CAPACITY, VOCAB = 24, 300
EXAMPLE = "the cat sat"
TEXT = ["the cat sat on the mat", "The mat, the cat: the hat!", "a cat and a hat\n\tthat sat"] * 3


@lru_cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE of the text above."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            initial_alphabet=alphabet,
            special_tokens=["<eos>"],
            show_progress=False,
        ),
    )
    return same_tokenizer(made)


@lru_cache
def trained() -> LoadedModel:
    config = tiny_config(
        **{
            "tokenizer.vocab_size": VOCAB,
            "tokenizer.canonical_vocab_size": 0,
            "data.seq_len": CAPACITY,
            "train.samples": ("a", EXAMPLE),
        }
    )
    program = build_program(config, build_addressing(config, tokenizer()))
    rng = np.random.default_rng(0)

    def some(path: Any, x: Any) -> Any:
        gain = "gain" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(float(gain), 0.3, x.shape), x.dtype)

    weights = jax.tree_util.tree_map_with_path(some, program.abstract_weights())
    return LoadedModel(program, weights, tokenizer(), 0, 7, "random", "", CAPACITY)


def documents() -> list[np.ndarray]:
    return [np.array([*tokenizer().encode(text).ids, 0], np.int32) for text in TEXT]


def counted() -> Counted:
    addressing = trained().program.addressing
    texts = [(ids[None], np.ones_like(ids)[None]) for ids in documents()]
    total = sum(map(len, documents()))
    counts = count_ngrams(addressing, addressing.layers[1], texts)
    readers = {k: RowReaders(layer, counts) for k, layer in addressing.layers.items()}
    return Counted(total, 2 * total, counts, readers)


def explorer(text: TrainingText | None = None, **serve: Any) -> Explorer:
    """text: by default one that is not counted yet."""
    model = trained()
    given = {**vars(model.program.config.serve), **serve}
    own = with_capacity(model, type(model.program.config.serve)(**given), lambda line: None)
    return Explorer(model, own, text or TrainingText(counted, lambda line: None))


def counted_text() -> TrainingText:
    text, told = TrainingText(counted, lambda line: told.set()), threading.Event()
    text.start()
    assert told.wait(30)
    return text


class Page(Client):
    """The page of an explorer, served in a thread; ends with the block."""

    def __init__(self, explorer: Explorer, host: str = "127.0.0.1", body: int = 4096):
        self._explorer, self._host = explorer, host
        self._limits = Limits(body=body, seconds=5.0)

    def ask(self, **fields: Any) -> Answer:
        return self.post(json.dumps(fields).encode())

    def post(self, body: bytes, **headers: str) -> Answer:
        given = {"Content-Type": "application/json", **headers}
        return self.send("POST", "/explore", body, {k: v for k, v in given.items() if v})

    def __enter__(self) -> Page:
        app = App(self._explorer, self._host, self._limits)
        self._ending = contextlib.ExitStack()
        self._ending.callback(app.close)
        super().__init__(self._ending.enter_context(served(app.asgi, self._limits)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._ending.close()
