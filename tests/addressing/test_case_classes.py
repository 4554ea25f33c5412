"""The classes of case, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.addressing.case_classes import CASES, CLASSES, build_case_classes, class_of
from engram_jax.addressing.compression import build_compression

BY_HAND = {
    "apple": "lower",
    "Apple": "Title",
    "APPLE": "UPPER",
    "iPhone": "mixed",
    "A": "Title",
    "a": "lower",
    "42": "no letters",
    "": "no letters",
    ",": "no letters",
    "New York": "Title",
    "ABc": "mixed",
    "3rd": "lower",
    "B2": "Title",
    "ÉCOLE": "UPPER",
    "école": "lower",
    "日本": "no letters",
}


@pytest.mark.parametrize(("text", "case"), BY_HAND.items())
def test_classes_by_hand(text, case):
    assert class_of(text) == CASES.index(case)
    if text:
        assert class_of(f" {text}") == class_of(f"\n{text}") == CASES.index(case) + 5
        assert class_of(f"{text} ") == class_of(text)


def test_white_space_alone_is_not_leading():
    assert CLASSES == 10
    for text in (" ", "\n", "\t  "):
        assert class_of(text) == CASES.index("no letters")


def test_the_table_tells_what_one_canonical_id_stands_for(small_tokenizer):
    """pad Apple PAD tree café CAFE ' apple' house <eos>."""
    classes = build_case_classes(small_tokenizer)
    np.testing.assert_array_equal(classes, [1, 2, 3, 1, 1, 3, 6, 1, 1])
    assert classes.dtype == np.int32
    canonical = build_compression(small_tokenizer)
    for i in range(9):  # raw ids of one canonical id differ in their class
        same = np.flatnonzero(canonical == canonical[i])
        assert len(set(classes[same])) == len(same)
