"""Vocabulary compression: raw token id -> canonical id (paper, section 2.1; Appendix C, Table 6).

Tokens that are equal up to case, accents and surrounding white space share one canonical id, so
that " Apple", "apple" and "APPLE" form the same n-grams. The map is a function of the tokenizer
alone.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from engram_jax.addressing.tokenizer import tokenizer_size

REPLACEMENT = "\ufffd"  # decoding a part of a character gives this
_ONE_SPACE = "\ue000"  # private use: stands for a lone space while the rest is stripped


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _ONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_ONE_SPACE, " "),
        ]
    )


def canonical_keys(tokenizer: Tokenizer) -> list[str]:
    """The key of every raw id; ids with equal keys share a canonical id.

    It is the id's decoded text (special tokens kept), normalised; the text itself where normalising
    leaves nothing; the raw token string where the text has a broken character.
    """
    size = tokenizer_size(tokenizer)
    texts = tokenizer.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    normalizer, found = _normalizer(), []
    for raw, text in enumerate(texts):
        key = normalizer.normalize_str(text) or text
        found.append((tokenizer.id_to_token(raw) or text) if REPLACEMENT in text else key)
    return found


def build_compression(tokenizer: Tokenizer) -> np.ndarray:
    """Canonical id of every raw id: int32 [V], V = highest id + 1.

    Canonical ids number the keys (`canonical_keys`) in order of first appearance, so they are dense
    from 0.
    """
    canonical_of_key: dict[str, int] = {}
    keys = canonical_keys(tokenizer)
    found = [canonical_of_key.setdefault(key, len(canonical_of_key)) for key in keys]
    return np.asarray(found, np.int32)
