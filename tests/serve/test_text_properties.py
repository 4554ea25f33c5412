"""The text of any tokens, of every kind of tokenizer, against the library's decoding of all."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from engram_jax.addressing.detokenizer import _byte_of
from engram_jax.serve.text_stream import TextStream, continuation
from tests.properties import examples
from tests.tokenizer_kinds import KINDS, TEXT, kind

PAST = 3  # ids that the tokenizer does not have


def ids_of(name):
    """Any ids, special and unknown ones, too; and pieces of text as the tokenizer cuts them."""
    tokenizer = kind(name)
    one = st.integers(0, tokenizer.get_vocab_size() + PAST - 1).map(lambda i: [i])
    text = st.integers(0, len(TEXT) - 9).map(lambda at: tokenizer.encode(TEXT[at : at + 9]).ids)
    ids = st.lists(one | text, max_size=20).map(lambda parts: [i for ids in parts for i in ids])
    if "Strip" in name:  # the library fails where less is left than it strips
        return ids.map(lambda ids: [*map(tokenizer.token_to_id, "cc"), *ids])
    return ids


def streamed(tokenizer, ids, stop=()):
    """(what is sent for each token and at the end, whether it stopped)."""
    stream, pieces = TextStream(tokenizer, stop), []
    for token in ids:
        text, stopped = stream.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    text, stopped = stream.flush()
    return [*pieces, text], stopped


@pytest.mark.parametrize("name", KINDS)
def test_the_pieces_are_the_whole(name):
    tokenizer = kind(name)

    @examples(40)
    @given(ids=ids_of(name))
    def check(ids):
        pieces, stopped = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) and not stopped

    check()


@pytest.mark.parametrize("name", KINDS)
def test_the_text_ends_where_a_stop_string_begins(name):
    """Stop strings out of the text itself and made up: what is sent is the whole text's beginning,
    holds none of them, and one of them comes next; or it is all, and there is none in it."""
    tokenizer = kind(name)

    @examples(40)
    @given(ids=ids_of(name), data=st.data())
    def check(ids, data):
        whole = tokenizer.decode(ids)
        made_up = st.text("ae mory\N{REPLACEMENT CHARACTER}", min_size=1, max_size=3)
        cuts = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 4)).map(
            lambda cut: whole[cut[0] : sum(cut)]
        )
        stop = data.draw(st.lists(made_up | cuts if whole else made_up, min_size=1, max_size=3))
        pieces, stopped = streamed(tokenizer, ids, stop)
        sent = "".join(pieces)
        assert whole.startswith(sent)
        assert not any(s in sent for s in stop)
        assert stopped == any(s in whole for s in stop)
        if stopped:
            assert whole.startswith(tuple(stop), len(sent))
        else:
            assert sent == whole

    check()


@pytest.mark.parametrize("name", ["byte-level BPE", "Unigram, Metaspace", "no decoder"])
def test_behind_a_prompt_the_text_goes_on(name):
    tokenizer = kind(name)
    prompt = tokenizer.encode(TEXT[:40]).ids

    @examples(40)
    @given(ids=ids_of(name))
    def check(ids):
        whole = tokenizer.decode([*prompt, *ids])
        assert tokenizer.decode(prompt) + continuation(tokenizer, prompt, ids) == whole

    check()


CHARACTERS = "aé日b"


@lru_cache
def cut_anywhere():
    """A byte-level tokenizer that has a token for every row of up to 4 bytes of such characters,
    so that a text can be cut into tokens in every way."""
    letters = ["".join(x) for x in itertools.product(CHARACTERS, repeat=4)]
    rows = {t.encode()[i:j] for t in letters for i in range(12) for j in range(i + 1, i + 5)} - {
        b""
    }
    shown = {byte: letter for letter, byte in _byte_of().items()}
    pieces = sorted("".join(shown[b] for b in row) for row in rows)
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.decoder = decoders.ByteLevel()
    return made, lambda row: made.token_to_id("".join(shown[b] for b in row))


def ends(text, stops, after):
    """(where the stop string begins that is complete first, behind `after` characters; where it
    ends): the longest, if several end there. By trying all ends."""
    for end in range(after + 1, len(text) + 1):
        if done := [s for s in stops if text[:end].endswith(s)]:
            return end - max(map(len, done)), end
    return None


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_that_is_complete_first_decides_wherever_tokens_end(include):
    tokenizer, id_of = cut_anywhere()
    texts = st.text(CHARACTERS, max_size=12)

    @examples(150)
    @given(
        text=texts,
        stops=st.lists(st.text(CHARACTERS, min_size=1, max_size=5), max_size=4),
        cuts=st.randoms(use_true_random=False),
        least=st.integers(0, 3),
    )
    def check(text, stops, cuts, least):
        data, places, at = text.encode(), [], 0
        while at < len(data):
            places.append((at, min(len(data), at + cuts.randint(1, 4))))
            at = places[-1][1]
        begins = [len(data[:a].decode(errors="ignore")) for a, _ in places]  # of its character
        settled = [len(data[:b].decode(errors="ignore")) for _, b in places]
        found = ends(text, stops, settled[min(least, len(places)) - 1] if least and places else 0)
        stream, sent, listed, count = TextStream(tokenizer, stops, include=include), "", [], 0
        for count, (a, b) in enumerate(places, 1):
            part, stopped = stream.push(id_of(data[a:b]), count - 1, stops=count > least)
            sent, listed = sent + part, listed + stream.listed()
            assert not stops or all(begins[n] < len(sent) for n in listed)
            if stopped:
                break
        sent, listed = sent + stream.flush()[0], listed + stream.listed(final=True)
        if found is None:
            assert sent == text and listed == list(range(len(places)))
            return
        end = found[include]
        assert sent == text[:end]
        assert listed == [n for n, begin in enumerate(begins[:count]) if begin < end]
        assert settled[count - 1] >= found[1] and (count < 2 or settled[count - 2] < found[1])

    check()
