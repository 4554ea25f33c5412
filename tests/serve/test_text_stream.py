"""Tokens to text: whole characters, and nothing of a stop string."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from engram_jax.serve.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level: ids 0 to 255 are the bytes, so that characters span tokens; 256 is special."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<end>"])
    return made


def run(tokenizer, ids, stop=()):
    """(pieces, whether it stopped, tokens it took)."""
    stream, pieces = TextStream(tokenizer, stop), []
    for count, token in enumerate(ids, 1):
        text, stopped = stream.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True, count
    text, stopped = stream.flush()
    return [*pieces, text], stopped, len(ids)


@pytest.mark.parametrize("text", ["abc", "naïve – 日本語 🎉🎉", " a  b\n", "é" * 20])
def test_pieces_are_characters_and_make_the_text(tokenizer, text):
    pieces, stopped, _ = run(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text and not stopped
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_broken_character_comes_at_the_end(tokenizer):
    ids = tokenizer.encode("aé").ids[:-1]
    assert run(tokenizer, ids)[0] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_long_row_of_broken_characters_is_not_held(tokenizer):
    """Held, it would be decoded again at every token: seconds per 4,000 of them."""
    lone = tokenizer.encode("é").ids[1]
    pieces = run(tokenizer, [lone] * 500)[0]
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 500
    assert len(pieces[-1]) <= 40


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_become_what_they_are_as_a_whole(tokenizer, seed, special):
    rng = np.random.default_rng(seed)
    parts = [tokenizer.encode(c).ids for c in "aé日🎉"]
    ids = []
    for _ in range(300):  # mostly broken: long rows of it, characters cut off in them
        one = parts[rng.integers(4)]
        ids += one[: rng.integers(1, len(one) + 1)] if rng.random() < 0.3 else one[1:2]
        if special and rng.random() < 0.2:  # without text, and one that no tokenizer knows
            ids.append(int(rng.integers(256, 258)))
    assert "".join(run(tokenizer, ids)[0]) == tokenizer.decode(ids)


def test_special_tokens_where_a_row_is_let_go(tokenizer):
    lone, first, *rest = (tokenizer.encode(c).ids for c in ["é", "日", "abc"])
    ids = [lone[1]] * 30 + [first[0], 256, *first[1:], *rest[0]]
    assert "".join(run(tokenizer, ids)[0]) == tokenizer.decode(ids)


def test_a_tokenizer_that_takes_back_what_it_said():
    """Byte fallback: a byte that breaks a row of them breaks the characters before it, too. So the
    row is told when it is over."""
    names = ["<0x41>", "<0xE2>", "x", "\u2581hi", "<s>"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>"])
    broken = "\N{REPLACEMENT CHARACTER}"
    assert run(made, [0, 1, 2])[0] == ["", "", f"{broken}{broken}x", ""]
    assert run(made, [0, 0, 3, 0])[0] == ["", "", "AA hi", "", "A"]
    assert "".join(run(made, [3] + [4] * 40 + [3, 3])[0]) == "hi hi hi"


def test_special_tokens_have_no_text(tokenizer):
    ids = [*tokenizer.encode("ab").ids, 256, *tokenizer.encode("c").ids]
    assert "".join(run(tokenizer, ids)[0]) == "abc"


@pytest.mark.parametrize("text", ["aabaabaaac", "xaaay", "aaaa", "abab", "aé日b"])
@pytest.mark.parametrize("stop", [("aaa",), ("ab", "ba"), ("c",), ("日",), ("é日", "y"), ("zz",)])
def test_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    """Against the text as a whole: the stop string that is complete first, and its first place."""
    pieces, stopped, count = run(tokenizer, tokenizer.encode(text).ids, stop)
    done = [text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
    if not done:
        assert not stopped and "".join(pieces) == text
        return
    first = done[0]
    end = len(first) - max(len(s) for s in stop if first.endswith(s))
    assert stopped and "".join(pieces) == text[:end]
    assert count == len(first.encode())


def test_nothing_of_a_stop_string_is_sent_early(tokenizer):
    pieces = run(tokenizer, tokenizer.encode("one STOX two STOP three").ids, ("STOP",))[0]
    sent = list(itertools.accumulate(pieces))
    assert sent[-1] == "one STOX two "
    assert all(not s.endswith(("S", "ST", "STO")) for s in sent if s != "")


def test_the_same_text_ends_at_the_same_place(tokenizer):
    """With `abcd` and `c`, `c` is complete first, whether `abcd` is one token or four."""
    letters = {"abcd": 0, "a": 1, "b": 2, "c": 3, "d": 4, "ab": 5, "cd": 6}
    made = Tokenizer(models.BPE(letters, []))
    made.decoder = decoders.ByteLevel()
    for ids in ([0], [1, 2, 3, 4], [5, 6], [5, 3, 4]):
        assert "".join(run(made, ids, ("abcd", "c"))[0]) == "ab"
        assert "".join(run(made, ids, ("c", "bc", "abc"))[0]) == ""


def test_tokens_of_a_stop_string_are_not_listed(tokenizer):
    """Nor one of a character that it begins with; one that reaches into it is."""
    ids = tokenizer.encode("one 日本 two").ids
    stream, listed, late = TextStream(tokenizer, ("日本",)), [], []
    for number, token in enumerate(ids):
        if stream.push(token, number)[1]:
            break
        listed += stream.listed()
        late.append(number - len(listed) + 1)
    assert listed + stream.listed(final=True) == [0, 1, 2, 3]
    assert late == [0] * 4 + [1, 2, 3, 4, 5]  # held back as long as the text is
    assert stream.flush() == ("", True)


@pytest.mark.parametrize("text", ["a" * 3000, "ab" * 1500, "aab" * 1000])
def test_hostile_stop_strings_cost_what_the_text_does(tokenizer, text):
    """Amortised: comparisons are counted, not timed. Held text was compared anew at every token."""
    steps = 0

    class Counted(str):
        def __getitem__(self, at):
            nonlocal steps
            steps += isinstance(at, int)
            return super().__getitem__(at)

    stops = [Counted((text[:60] * 17)[: 999 - n] + "!") for n in range(16)]
    pieces, stopped, _ = run(tokenizer, tokenizer.encode(text).ids, stops)
    assert "".join(pieces) == text and not stopped
    assert steps < 16 * 8 * (len(text) + 1000)
