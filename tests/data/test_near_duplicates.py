"""Near duplicates: every pair compared with every other, and none on both sides of the split."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.data import source_report as why
from engram_jax.data.cache import cache_root
from engram_jax.data.corpus import open_corpus
from engram_jax.data.near_duplicates import bands, jaccard, resembling, shingles

pytest.importorskip("datasketch")


def brute_force(a: str, b: str) -> float:
    """By the definition, on lists of tuples of words."""
    sets = []
    for text in (a, b):
        words = text.split()
        grams = {tuple(words[i : i + 5]) for i in range(len(words) - 4)} or {tuple(words)}
        sets.append(grams)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited_copies(count: int, seed: int = 0) -> list[str]:
    """Documents, each followed by a copy with more words changed than in the copy before."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        words = [f"w{n}" for n in rng.integers(0, 500, 120)]
        copy = list(words)
        for place in rng.choice(120, i % 12, replace=False):
            copy[place] = "changed"
        texts += [" ".join(words), " ".join(copy) + " end"]
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_what_is_found_is_what_brute_force_finds(threshold):
    texts = edited_copies(60)
    held = np.arange(len(texts)) % 4 == 0
    encoded = [text.encode() for text in texts]
    found = resembling(lambda order: iter([encoded[i] for i in order]), held, threshold)
    expected = np.zeros(len(texts), bool)
    for i in np.flatnonzero(~held):
        others = np.flatnonzero(held)
        expected[i] = any(brute_force(texts[i], texts[j]) >= threshold for j in others)
    assert 5 < expected.sum() < 30
    np.testing.assert_array_equal(found, expected)


def test_jaccard_by_hand():
    a, b = b"a b c d e f", b"a b c d e g"  # {abcde, bcdef} and {abcde, bcdeg}
    assert jaccard(shingles(a), shingles(b)) == 1 / 3
    assert shingles(b" too\n few ") == {b"too few"}
    assert jaccard(shingles(b"few"), shingles(b"few")) == 1.0


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_propose_what_is_at_the_threshold(threshold):
    count, rows = bands(threshold)
    assert count * rows <= 128
    if threshold >= 0.3:
        assert 1 - (1 - threshold**rows) ** count >= 0.999
    else:
        assert rows == 1  # the most that there is


def test_the_held_out_text_stays_and_no_near_copy_of_it_is_trained_on(tmp_path, make_config):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, text in enumerate(edited_copies(60)):
        (folder / f"{number:03}.txt").write_text(text)

    def opened(similarity):
        config = make_config(folder, near_duplicates=similarity)
        return open_corpus(config.data, cache_root(config.data), lambda line: None)

    def both(corpus):
        return [set(corpus.documents(split)) for split in ("train", "validation")]

    (all_train, held), (train, same) = both(plain := opened(0.0)), both(fewer := opened(0.7))
    assert held == same and train < all_train
    left_out = {t for t in all_train if any(brute_force(t, h) >= 0.7 for h in held)}
    assert left_out and train == all_train - left_out
    assert fewer.report.skipped[why.NEAR_DUPLICATE].count == len(left_out)
    assert fewer.report.train_documents == len(train)
    assert fewer.report.digest != plain.report.digest
    assert both(opened(0.7)) == [train, held]  # from the cache


def test_refusals(tmp_path, make_config):
    with pytest.raises(UserError, match=r"data\.near_duplicates = 1\.5: must be a Jaccard"):
        make_config(tmp_path, near_duplicates=1.5)
    with pytest.raises(UserError, match=r"data\.near_duplicates = 0\.5: must be 0 for"):
        make_config("lm1b", source="tfds", near_duplicates=0.5)
    same = "one two three four five six seven eight"
    (tmp_path / "a.txt").write_text(same)
    (tmp_path / "b.txt").write_text(same + " nine")
    config = make_config(tmp_path, near_duplicates=0.5)
    with pytest.raises(UserError, match="every training document"):
        open_corpus(config.data, cache_root(config.data), lambda line: None)
