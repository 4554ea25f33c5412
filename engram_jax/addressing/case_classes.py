"""What vocabulary compression removes from a token, as one of ten classes.

Compression (compression.py) makes " Apple", "apple" and "APPLE" one canonical id. A class says
which of them the token was: whether white space comes before it, and the case of its letters. It is
kept beside the address (config.model.engram.case): a learned vector per class is added to what the
address reads, so the rows stay shared and what distinguished the tokens is not lost.

What else compression removes (accents, compatibility forms, white space after the text) is in no
class.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from engram_jax.addressing.tokenizer import tokenizer_size

# Of the letters that have a case.
CASES = ("no letters", "lower", "Title", "UPPER", "mixed")
CLASSES = 2 * len(CASES)  # first those of tokens without white space before them


def case_of(text: str) -> int:
    """Index in CASES. A single capital is "Title" (as "A" at the start of a sentence), and so is a
    text of several words that each begin with one ("New York")."""
    if not any(c.islower() or c.isupper() or c.istitle() for c in text):
        return 0
    if text == text.lower():
        return 1
    if text.istitle():
        return 2
    return 3 if text.isupper() else 4


def class_of(text: str) -> int:
    """The class of a decoded token, in [0, CLASSES)."""
    return case_of(text) + len(CASES) * (text[:1].isspace() and not text.isspace())


def build_case_classes(tokenizer: Tokenizer) -> np.ndarray:
    """The class of every raw id: int32 [V], V = highest id + 1. A function of the tokenizer alone.

    A token is decoded by itself, as for compression (special tokens kept).
    """
    size = tokenizer_size(tokenizer)
    texts = tokenizer.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    return np.array([class_of(text) for text in texts], np.int32)
