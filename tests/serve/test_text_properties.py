"""The text of any tokens, of every kind of tokenizer, against the library's decoding of all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
