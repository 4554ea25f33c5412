"""Provides the tokenizer: a byte-level BPE trained on the training split, or the user's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_jax.addressing.tokenizer import load_tokenizer, tokenizer_size
from engram_jax.config import TokenizerConfig
from engram_jax.config.errors import UserError
from engram_jax.data.cache import build_once, key_of
from engram_jax.data.corpus import Corpus

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
# Merges learnt from more text than this differ little; training takes seconds per ten megabytes.
SAMPLE_BYTES = 64 << 20
# Characters. Training time is quadratic in a word's length: a run of a megabyte (base64, a minified
# script, blanks) took half an hour. No merge needs longer runs; only training splits them.
LONGEST_RUN = 1000

# The usual names of end-of-document tokens, most specific first.
EOS_NAMES = (
    EOS,
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",  # DeepSeek; the bars and blocks are not ASCII
    "<|end_of_text|>",
    "<|end_of_sentence|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
)

_BYTES = 256
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN + 1},}}|\s{{{LONGEST_RUN + 1},}}")


def open_tokenizer(
    config: TokenizerConfig, corpus: Corpus, cache: Path, log: Callable[[str], Any] = print
) -> tuple[Tokenizer, Path]:
    """The tokenizer and the path of its `tokenizer.json`.

    config.path if given, else a BPE of config.vocab_size ids trained on the corpus, cached by both.
    Raises UserError if it has more ids than config.vocab_size.
    """
    if config.path:
        path = Path(config.path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
    else:
        path = _trained(config, corpus, cache, log)
    tokenizer = load_tokenizer(path)
    size = tokenizer_size(tokenizer)
    if size > config.vocab_size:
        raise UserError(
            f"config.tokenizer.vocab_size = {config.vocab_size}: the tokenizer {path} has {size} "
            f"ids; must be at least {size}"
        )
    return tokenizer, path


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: ids 0, 1, 2 are <|pad|>, <|bos|>, <|eos|>, then the 256 bytes, then merges.

    The same texts give the same tokenizer. A small text may not have enough merges for vocab_size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def find_eos(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """The id that ends a document: config.eos_id if set, else the first of EOS_NAMES that exists.
    Raises UserError if none does."""
    size = tokenizer_size(tokenizer)
    if config.eos_id >= size:
        raise UserError(
            f"config.tokenizer.eos_id = {config.eos_id}: the tokenizer {config.path or config.name}"
            f" has {size} ids; must be below {size}"
        )
    if config.eos_id >= 0 and tokenizer.id_to_token(config.eos_id) is None:
        raise UserError(
            f"config.tokenizer.eos_id = {config.eos_id}: the tokenizer {config.path or config.name}"
            " has no token there; must be an id that it has"
        )
    if config.eos_id >= 0:
        return config.eos_id
    for name in EOS_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise UserError(
        f"tokenizer {config.path or config.name}: no end-of-document token among "
        f"{', '.join(EOS_NAMES)}; set config.tokenizer.eos_id"
    )


def _trained(
    config: TokenizerConfig, corpus: Corpus, cache: Path, log: Callable[[str], Any]
) -> Path:
    smallest = len(SPECIAL_TOKENS) + _BYTES
    if config.vocab_size < smallest:
        raise UserError(
            f"config.tokenizer.vocab_size = {config.vocab_size}: must be at least {smallest} "
            "(bytes and special tokens) for a tokenizer trained here"
        )

    def make(folder: Path) -> None:
        log(f"data: training a tokenizer of {config.vocab_size:,} ids")
        train_bpe(_sample(corpus), config.vocab_size).save(str(folder / "tokenizer.json"))

    key = key_of(corpus.report.digest, config.vocab_size, SPECIAL_TOKENS, SAMPLE_BYTES, LONGEST_RUN)
    return build_once(cache / "tokenizers" / key, make) / "tokenizer.json"


def _sample(corpus: Corpus) -> Iterator[str]:
    """The first SAMPLE_BYTES of the training split (its order is by content, so a fair sample), in
    parts without a run of more than LONGEST_RUN blank, or of as many other, characters."""
    left = SAMPLE_BYTES
    for text in corpus.documents("train"):
        yield from _without_long_runs(text)
        left -= len(text.encode())
        if left <= 0:
            return


def _without_long_runs(text: str) -> Iterator[str]:
    """`text` in parts, split within long runs."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:end]
            start = end
    yield text[start:]
