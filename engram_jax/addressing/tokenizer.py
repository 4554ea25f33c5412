"""Loads a `tokenizer.json`, and fingerprints a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import read_text

# Words, signs, code and scripts of which a vocabulary lacks some.
_ANY_TEXT = (
    "The quick brown fox, 1234.5!",
    "def f(x):\n\treturn {x: '\\0'}\n",
    "ß Ω я 中 \U0001f600",
)


def load_tokenizer(path: str | Path, *, parse_special: bool = False) -> Tokenizer:
    """The tokenizer stored at `path`: a `tokenizer.json`, or a folder that holds one.

    Every part of the program loads tokenizers with it, so that a text has the same ids in training
    and serving: those of the text, nothing added (truncation, padding, the post-processor and BPE's
    dropout are cleared), with special tokens spelled in it encoded as text. Added tokens that are
    not special are ordinary words of the vocabulary.

    parse_special: special tokens spelled in a text become their ids.

    Raises UserError naming the path when there is no such file or it does not hold a tokenizer.
    """
    file = Path(path).expanduser()
    if os.path.isdir(file):  # Path.is_dir raises for a name that is too long
        file = file / "tokenizer.json"
    if not os.path.exists(file) and not os.path.islink(file):
        raise UserError(f"tokenizer {shown(file)}: no such file; give the path of a tokenizer.json")
    text = read_text(file, "tokenizer")
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # bare Exception for what it cannot parse; panics, too
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = shown(str(error).splitlines()[0], quoted=False)
        raise UserError(f"tokenizer {shown(file)}: not a tokenizer.json ({reason})") from error
    return _as_trained_with(tokenizer, parse_special)


def same_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer that is in memory, as `load_tokenizer` gives that of a file."""
    return _as_trained_with(Tokenizer.from_str(tokenizer.to_str()), parse_special=False)


def _as_trained_with(tokenizer: Tokenizer, parse_special: bool) -> Tokenizer:
    """See `load_tokenizer`; changes the tokenizer in place."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None  # draws other ids for the same text each time
    _keep_special_tokens_out_of_words(tokenizer)
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


def _keep_special_tokens_out_of_words(tokenizer: Tokenizer) -> None:
    """Where the model itself encodes the text of a special token as that token (Unigram's piece
    "</s>", a word "</s>" between blanks), split the text after its first character."""
    model, made = tokenizer.model, []
    for token in tokenizer.get_added_tokens_decoder().values():
        word = model.token_to_id(token.content) if token.special else None
        if word is not None and word in [t.id for t in model.tokenize(token.content)]:
            made.append(token.content)
    if not made:
        return
    pattern = "|".join(f"{re.escape(c[0])}(?={re.escape(c[1:])})" for c in sorted(made))
    split = pre_tokenizers.Split(Regex(pattern), "merged_with_previous")
    before = tokenizer.pre_tokenizer
    if before is None:
        tokenizer.pre_tokenizer = split
        return
    state = json.loads(before.__getstate__())
    if json.loads(split.__getstate__()) not in state.get("pretokenizers", [state])[-1:]:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before, split])


def check_encodes(tokenizer: Tokenizer, path: str | Path) -> None:
    """Raises UserError for a tokenizer that has no ids, or that fails on a text it does not know
    (a WordLevel model without its unknown token, for one)."""
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise UserError(f"tokenizer {shown(path)}: its vocabulary is empty")
    for text in _ANY_TEXT:
        encode_batch(tokenizer, [text], path)


def encode_batch(
    tokenizer: Tokenizer, texts: list[str], path: str | Path = "", *, offsets: bool = False
) -> list[Any]:
    """The texts' encodings without anything added; offsets: with every token's characters, which
    takes longer. Raises UserError where the tokenizer fails."""
    try:
        if offsets:
            return tokenizer.encode_batch(texts, add_special_tokens=False)
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        reason = shown(str(error).splitlines()[0], quoted=False)
        name = f"tokenizer {shown(path)}" if path else "the tokenizer"
        raise UserError(f"{name}: cannot encode every text ({reason})") from error


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what the tokenizer does not know; None if it knows every text."""
    if isinstance(tokenizer.model, models.Unigram):
        return json.loads(tokenizer.to_str())["model"]["unk_id"]
    token = getattr(tokenizer.model, "unk_token", None)
    return None if token is None else tokenizer.token_to_id(token)


def tokenizer_size(tokenizer: Tokenizer) -> int:
    """Number of ids, added tokens included: one more than the highest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def drawable_ids(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray | None:
    """Which of the ids 0 .. `vocab_size` - 1 the tokenizer has a token for, bool [vocab_size]; None
    = all, or there is no tokenizer. A model's vocabulary may be larger, and a tokenizer's ids may
    have gaps: such an id has no text."""
    if tokenizer is None:
        return None
    found = np.array([tokenizer.id_to_token(i) is not None for i in range(vocab_size)])
    return None if found.all() else found


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of everything that turns text into ids and ids into text.

    That is normalizer, pre-tokenizer, model with its merges, added tokens with their options, and
    decoder. What `load_tokenizer` clears is left out, since it then changes no id. Merges are read
    in both forms ("a b" and ["a", "b"]) that versions of the library write.
    """
    state = json.loads(tokenizer.to_str())
    for cleared in ("truncation", "padding", "version"):
        state.pop(cleared, None)
    return _digest({**state, "post_processor": None})


def former_fingerprint(folder: Path) -> str:
    """The fingerprint that earlier versions gave a run's tokenizer.json, post-processor included;
    "" if they encoded the same text to other ids (dropout, special tokens as words)."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer_fingerprint(raw) != tokenizer_fingerprint(load_tokenizer(folder)):
        return ""
    state = json.loads(raw.to_str())
    for set_at_run_time in ("truncation", "padding", "version"):
        state.pop(set_at_run_time, None)
    return _digest(state)


def _digest(state: dict[str, Any]) -> str:
    model: dict[str, Any] = state["model"]
    if "merges" in model:
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
