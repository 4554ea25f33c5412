"""Small tokenizers of every kind that decodes in its own way, with the same special tokens."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TEXT = (
    "The memory reads what the tokens before have said, and the network reads the memory. naïve "
    "Ünïcode, ﬁne ligatures: ½ of it; 日本語 and \N{PARTY POPPER} too.  Two  spaces,\n\ttabs.\n"
)
SPECIAL = ("<s>", "</s>")
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _byte_level(prefix_space: bool = False, normalizer=None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


WORDS = ["\u2581", "\u2581the", "\u2581memory", "a", "e", "s", "<", "/", ">", "\u2581\u2581", "é"]


def _pieces(byte_fallback: bool) -> Tokenizer:
    """Unigram as SentencePiece makes it; the special tokens are in its vocabulary, too."""
    pieces = ["<unk>", *SPECIAL, *(BYTES if byte_fallback else []), *WORDS]
    scores = [(piece, 0.0 if piece in ("<unk>", *SPECIAL) else -3.0) for piece in pieces]
    made = Tokenizer(models.Unigram(scores, 0, byte_fallback))
    if byte_fallback:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return made


def _word_pieces() -> Tokenizer:
    words = ["[UNK]", *SPECIAL, "the", "memory", "##s", "##e", "re", "##ads", ".", ",", "do", "n't"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(list(SPECIAL))
    return made


def _words(decoder=None, words=("a", "b</w>", "c", " x ", "\u2581y", "<0x41>", "é")) -> Tokenizer:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens(list(SPECIAL))
    return made


KINDS = {
    "byte-level BPE": lambda: _byte_level(),
    "byte-level BPE with a prefix space": lambda: _byte_level(prefix_space=True),
    "byte-level BPE behind NFKC": lambda: _byte_level(normalizer=normalizers.NFKC()),
    "Unigram, Metaspace": lambda: _pieces(byte_fallback=False),
    "Unigram, byte fallback": lambda: _pieces(byte_fallback=True),
    "WordPiece": _word_pieces,
    "no decoder": _words,
    "BPEDecoder": lambda: _words(decoders.BPEDecoder("</w>")),
    "CTC": lambda: _words(decoders.CTC(pad_token="a", word_delimiter_token="c")),
    "Fuse, Strip both ends": lambda: _words(
        decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 1)])
    ),
    "byte fallback, Metaspace": lambda: _words(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "Fuse, Replace": lambda: _words(
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("ac+"), "!")])
    ),
}


@lru_cache
def kind(name: str) -> Tokenizer:
    return KINDS[name]()
