"""Compression against the published counts, the golden ids and classes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from engram_jax.addressing import build_compression, load_tokenizer, tokenizer_fingerprint
from engram_jax.addressing.tokenizer import tokenizer_size
from engram_jax.config.errors import UserError
from tests.addressing.cases import word_level


@pytest.fixture(scope="module", params=[("0.2.0", "addressing_demo"), ("0.3.0", "addressing_v41")])
def published(request, published_tokenizer, golden):
    version, name = request.param
    tokenizer = published_tokenizer(version)
    return version, tokenizer, build_compression(tokenizer), golden(name)


def test_published_tokenizers_compress_to_the_published_sizes(published):
    version, tokenizer, compression, golden = published
    ids, canonical = {"0.2.0": (128_815, 98_627), "0.3.0": (129_280, 99_092)}[version]
    assert tokenizer_size(tokenizer) == len(compression) == ids
    assert compression.max() + 1 == canonical == golden["compressed_vocab_size"]
    assert compression.dtype == np.int32


def test_published_tokenizers_give_the_golden_ids(published):
    _, _, compression, golden = published
    np.testing.assert_array_equal(compression[golden["raw_ids"]], golden["compressed_ids"])
    assert compression[golden["pad_id"]] == golden["compressed_pad_id"]


def test_largest_classes_are_the_papers(published):
    """Table 6 of the paper; byte-level BPE writes a space as U+0120."""
    _, tokenizer, compression, _ = published
    sizes = np.bincount(compression)
    names = {"\u0120": 163, "a": 54, "o": 40, "e": 35, "i": 30}
    found = {name: sizes[compression[tokenizer.token_to_id(name)]] for name in names}
    assert found == names
    assert sorted(sizes)[-4:] == [35, 40, 54, 163]


def test_canonical_ids_number_the_keys_as_they_first_appear(published):
    compression = published[2]
    _, first = np.unique(compression, return_index=True)
    assert (np.diff(first) > 0).all()


def test_classes_by_hand():
    tokens = ["Apple", " apple ", "APPLE", "äpple", "a\n\t p", "a p", "\ufb01t", "fit"]
    tokens += [" ", "\t\n", "   ", "\u0301", "\u0302", "\ufffdA", "\ufffda", "a", "\uff21"]
    expected = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 8]
    compression = build_compression(word_level(tokens, special=("<s>", "<S>")))
    np.testing.assert_array_equal(compression, [*expected, 9, 9])  # special tokens are text, too


def test_parts_of_characters_stay_apart():
    """Bytes 0xC3 and 0xE2 both decode to U+FFFD: the raw token strings are their keys."""
    tokenizer = Tokenizer(models.BPE({"Ã": 0, "â": 1, "A": 2, "a": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    np.testing.assert_array_equal(build_compression(tokenizer), [0, 1, 2, 2])


def test_gaps_in_the_ids_are_compressed_too():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "A": 5}, unk_token="a"))
    compression = build_compression(tokenizer)
    assert len(compression) == 6
    assert compression[5] == compression[0] == 0
    assert len(set(compression[1:5])) == 1


def test_load_tokenizer_takes_a_file_or_its_folder(tmp_path, small_tokenizer):
    small_tokenizer.save(str(tmp_path / "tokenizer.json"))
    fingerprint = tokenizer_fingerprint(small_tokenizer)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == fingerprint
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "tokenizer.json")) == fingerprint


@pytest.mark.parametrize("text", [None, "", '{"model": 1}', "not json\nat all"])
def test_load_tokenizer_refuses_in_one_line(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(
        UserError, match=r"tokenizer\.json: (no such file|not a tokenizer)"
    ) as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


def test_tokenizer_fingerprint_sees_the_ids_but_not_run_time_settings(small_tokenizer):
    before = tokenizer_fingerprint(small_tokenizer)
    small_tokenizer.enable_padding(length=8)
    small_tokenizer.enable_truncation(8)
    assert tokenizer_fingerprint(small_tokenizer) == before
    small_tokenizer.add_tokens(["more"])
    assert tokenizer_fingerprint(small_tokenizer) != before


def test_tokenizer_fingerprint_sees_the_order_of_merges():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    one, other = [("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]
    prints = [tokenizer_fingerprint(Tokenizer(models.BPE(vocab, m))) for m in (one, one, other)]
    assert prints[0] == prints[1] != prints[2]
