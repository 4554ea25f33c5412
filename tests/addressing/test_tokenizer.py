"""One loader: a text has the same ids, whatever a tokenizer.json adds, cuts or draws."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from engram_jax.addressing import (
    as_stored,
    build_addressing,
    check_same,
    load_tokenizer,
    tokenizer_fingerprint,
)
from engram_jax.config import Config, EngramConfig, ModelConfig, TokenizerConfig
from engram_jax.config.errors import UserError
from tests.tokenizer_kinds import KINDS, SPECIAL, TEXT, kind

OF_MODELS = list(KINDS)[:7]
SPELLED = ["</s>", "the </s> memory", "a</s>e", "</s></s><s>", " </s>\n<s> ", "<s>the</s>."]


def busy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that does what programs set as they go, and adds special tokens."""
    made = Tokenizer.from_str(tokenizer.to_str())
    ids = [(token, made.token_to_id(token)) for token in SPECIAL]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    made.enable_truncation(4)
    made.enable_padding(length=12, pad_id=1, pad_token="<s>")
    return made


def saved(tokenizer: Tokenizer, folder, name: str = "tokenizer.json"):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / name))
    return folder / name


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_a_file_adds_and_cuts_changes_no_id(name, tmp_path):
    plain, other = kind(name), busy(kind(name))
    assert len(other.encode(TEXT).ids) == 12
    loaded = load_tokenizer(saved(other, tmp_path / "one"))
    ids = plain.encode(TEXT, add_special_tokens=False).ids
    assert len(ids) > 20
    for add in (True, False):
        assert loaded.encode(TEXT, add_special_tokens=add).ids == ids
        assert loaded.encode_batch_fast([TEXT], add_special_tokens=add)[0].ids == ids
    fingerprint = tokenizer_fingerprint(loaded)
    assert tokenizer_fingerprint(load_tokenizer(saved(plain, tmp_path / "two"))) == fingerprint
    again = load_tokenizer(saved(loaded, tmp_path / "three"))
    assert tokenizer_fingerprint(again) == fingerprint
    raw = Tokenizer.from_file(str(tmp_path / "three" / "tokenizer.json"))
    assert raw.encode(TEXT).ids == ids  # for other tools
    assert (raw.truncation, raw.padding, raw.post_processor) == (None, None, None)


@pytest.mark.parametrize("name", OF_MODELS)
def test_special_tokens_in_a_text_are_text(name, tmp_path):
    """Also where the model knows them as words: Unigram's pieces, words between blanks."""
    path = saved(busy(kind(name)), tmp_path)
    text, parsed = load_tokenizer(path), load_tokenizer(path, parse_special=True)
    special = {text.token_to_id(token) for token in SPECIAL}
    for spelled in SPELLED:
        assert not special & set(text.encode(spelled).ids), spelled
        found = [i for i in parsed.encode(spelled).ids if i in special]
        assert len(found) == spelled.count("s>")
    if "byte-level" in name and "prefix" not in name:
        assert all(text.decode(text.encode(spelled).ids) == spelled for spelled in SPELLED)


def words(**options) -> Tokenizer:
    made = Tokenizer(models.WordLevel({"?": 0, "a": 1, "<x>": 2, "<y>": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken("<x>", **options)])
    made.add_tokens([AddedToken("<y>", **options)])
    return made


@pytest.mark.parametrize("option", ["single_word", "lstrip", "rstrip", "normalized"])
@pytest.mark.parametrize("value", [True, False])
def test_options_of_added_tokens(option, value, tmp_path):
    """A special token stays text under all of them; one that is not special is a word always."""
    path = saved(words(**{option: value}), tmp_path)
    text, parsed = load_tokenizer(path), load_tokenizer(path, parse_special=True)
    assert text.encode("a <x> a").tokens == ["a", "?", "?", "a"]
    assert parsed.encode("a <x> a").ids == [1, 2, 1]
    assert text.encode("a <y> a").ids == parsed.encode("a <y> a").ids == [1, 3, 1]
    prints = [tokenizer_fingerprint(words(**{option: v})) for v in (True, False)]
    assert prints[0] != prints[1]


def test_dropout_is_cleared(tmp_path):
    """It draws the ids of a text anew each time."""
    vocab = {"a": 0, "b": 1, "ab": 2, "abab": 3}
    merges = [("a", "b"), ("ab", "ab")]
    made, plain = (Tokenizer(models.BPE(vocab, merges, dropout=d)) for d in (0.5, None))
    assert len({tuple(made.encode("abababab").ids) for _ in range(40)}) > 1
    loaded = load_tokenizer(saved(made, tmp_path))
    assert {tuple(loaded.encode("abababab").ids) for _ in range(40)} == {(3, 3)}
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(plain)


def test_the_fingerprint_sees_what_changes_ids_and_nothing_else():
    tokenizer = kind("byte-level BPE")
    state = json.loads(tokenizer.to_str())
    mine = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(busy(tokenizer)) == mine

    def changed(change) -> str:
        other = Tokenizer.from_str(json.dumps(state))
        change(other)
        return tokenizer_fingerprint(other)

    split = pre_tokenizers.Split(Regex("a"), "isolated")
    assert changed(lambda t: None) == mine
    changes = [
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "pre_tokenizer", split),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "decoder", None),
        lambda t: setattr(t.model, "ignore_merges", True),
        lambda t: t.add_tokens(["more"]),
        lambda t: t.add_special_tokens(["more"]),
        lambda t: t.add_special_tokens([AddedToken("</s>", lstrip=True)]),
    ]
    prints = {changed(change) for change in changes}
    assert len(prints | {mine}) == 1 + len(changes)


def test_the_fingerprint_of_a_tokenizer_trained_here_does_not_drift():
    """A different number here means that every stored checkpoint would be refused."""
    from engram_jax.data.train_bpe import train_bpe

    found = tokenizer_fingerprint(train_bpe(iter([TEXT] * 3), 300))
    assert found == "5926c58d657facba6858e988878759e8f119d2f5bf59981d18f333c45d4f854d"


# What the code gave these two before, with the post-processor of `busy`.
FORMER = {
    "byte-level BPE": "5058205e14e8fab4248f32b6b142edd9993c4c91e6534613f1673c4f61f62172",
    "Unigram, Metaspace": "0c7bc07f811b084212abfaf914033a92c125526a34f73430a3a59d6119422c4b",
}


@pytest.mark.parametrize("name", FORMER)
def test_runs_from_when_the_post_processor_counted(name, tmp_path):
    """They are read, since no id has changed; but not where one has (a special token as a word)."""
    raw = busy(kind(name))
    path = saved(raw, tmp_path)
    engram = EngramConfig(layers=(1,), rows_per_head=(50,), d_mem=64, heads_per_order=2)
    tokens, network = TokenizerConfig(vocab_size=400), ModelConfig(engram=engram)
    mine = build_addressing(Config(tokenizer=tokens, model=network), load_tokenizer(path))
    before = dataclasses.replace(mine, tokenizer_fingerprint=FORMER[name])
    assert as_stored(mine, tmp_path) is mine  # nothing is stored yet
    before.save(tmp_path / "addressing")
    if name == "byte-level BPE":
        check_same(before, as_stored(mine, tmp_path))
    else:
        with pytest.raises(UserError, match="older code, which read some tokenizers otherwise"):
            check_same(before, as_stored(mine, tmp_path))
    raw.add_tokens(["another"])
    raw.save(str(path))  # not the run's tokenizer: no proof
    assert as_stored(mine, tmp_path) is mine
