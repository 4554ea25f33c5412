"""Entities in a text: by a rule, or as a file labels them; and the tokens they end with.

The rule. A word is a letter and what follows of letters, digits, `_` and, between letters, `-` and
apostrophes; a blank, a quote, an opening bracket or the text's beginning stands before it. It is
capitalised if its first letter is, and it has two characters ("I" is none). A word begins a
sentence if it is the first of the text or of a line, or if what stands before it, but for blanks,
quotes and brackets, is `.`, `!` or `?` ("Mr. Smith" is therefore none). An entity is a longest run
of capitalised words with one space between each two, without a word that begins a sentence; a
possessive `'s` is left out and ends it. "The United Nations met in New York." has "United Nations"
and "New York".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.addressing.detokenizer import Detokenizer
from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_file
from engram_jax.data.array_store import ArrayStore, array_store

Span = tuple[int, int]  # characters, the end exclusive

_OPENING, _CLOSING = "\"'“‘«([{", "\"'”’»)]}"
_WORD = re.compile(rf"(?<![^\s{re.escape(_OPENING)}])[^\W\d_]\w*(?:[-'’](?=[^\W\d_])\w+)*")
_POSSESSIVE = re.compile(r"['’]s\Z")
_BEFORE = 64  # characters that are looked at before a word
_LONGEST = 1 << 24  # bytes of a line of a labelled file


def entities(text: str) -> list[Span]:
    """The entities of a text by the rule, in order."""
    found: list[Span] = []
    for match in _WORD.finditer(text):
        start = match.start()
        word = _POSSESSIVE.sub("", match[0])
        if len(word) < 2 or not word[0].isupper() or _begins(text, start):
            continue
        if found and text[found[-1][1] : start] == " ":
            start = found.pop()[0]
        found.append((start, match.start() + len(word)))
    return found


def _begins(text: str, start: int) -> bool:
    """Whether the word at `start` begins a sentence."""
    before = text[max(0, start - _BEFORE) : start].rstrip(" \t" + _OPENING)
    return not before or before[-1] in "\n\r" or before.rstrip(_CLOSING)[-1:] in (*".!?",)


def text_and_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[str, np.ndarray]:
    """(the text of tokens, int64 [T] how many characters of it are there after each token)."""
    detokenizer, parts = Detokenizer(tokenizer), list[str]()
    ends: list[int] = []
    for token in ids:
        before, own = detokenizer.push(int(token), skip_special_tokens=False)
        if ends:  # text that was held until now is of the token before
            ends[-1] += len(before)
        parts += [before, own]
        ends.append(detokenizer.length)
    parts.append(detokenizer.flush())
    text = "".join(parts)
    if ends:
        ends[-1] = len(text)
    return text, np.asarray(ends, np.int64)


def final_tokens(tokenizer: Any, ids: Sequence[int]) -> np.ndarray:
    """The tokens in which the entities of their text end: int64, ascending, each once."""
    text, ends = text_and_ends(tokenizer, ids)
    last = [end for _, end in entities(text)]
    return np.unique(np.searchsorted(ends, last))


def final_tokens_of_batch(tokenizer: Any, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """For every sequence of a packed batch, the tokens in which entities end. A document's part in
    a sequence is a text by itself, whose first word counts as the beginning of a sentence."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
        places = [np.zeros(0, np.int64)]
        for number in range(1, int(segments.max(initial=0)) + 1):
            at = np.flatnonzero(segments == number)
            if len(at):
                places.append(at[0] + final_tokens(tokenizer, tokens[at]))
        found.append(np.concatenate(places))
    return found


def read_labelled(path: Path) -> Iterator[tuple[str, list[Span]]]:
    """(text, entities) of every line of a file of JSON lines

        {"text": "She left New York.", "entities": [[9, 17]]}

    with spans in characters (Unicode code points), the end exclusive. Blank lines are left out.
    Raises UserError naming the line, for another form and for spans that are not in the text.
    """
    with open_file(path, "--entities") as file:
        number = 0
        while line := file.readline(_LONGEST):
            number += 1
            where = f"--entities {shown(path)}, line {number}"
            if len(line) == _LONGEST:
                raise UserError(f"{where}: longer than {_LONGEST:,} bytes")
            if line.strip():
                yield _labelled(line, where)


def _labelled(line: bytes, where: str) -> tuple[str, list[Span]]:
    form = 'must be {"text": "...", "entities": [[start, end], ...]}'
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON in UTF-8; {form}") from error
    text = record.get("text") if isinstance(record, dict) else None
    spans = record.get("entities") if isinstance(record, dict) else None
    if not isinstance(text, str) or not isinstance(spans, list):
        raise UserError(f"{where}: is {shown(record, most=60)}; {form}")
    for span in spans:
        whole = isinstance(span, list) and [type(x) for x in span] == [int, int]
        if not whole or not 0 <= span[0] < span[1] <= len(text):
            raise UserError(
                f"{where}: entity {shown(span, most=40)}: must be [start, end] with 0 <= start <"
                f" end <= {len(text)}, the text's characters"
            )
    return text, [(a, b) for a, b in spans]


def labelled_tokens(
    tokenizer: Any, eos_id: int, vocab_size: int, path: Path
) -> tuple[ArrayStore, np.ndarray]:
    """(the documents of a labelled file, each with its end; int64 ascending, the tokens of the
    store in which the entities end). Raises UserError as `read_labelled`, and without an entity."""
    documents, places, start = [], [], 0
    for text, spans in read_labelled(path):
        (encoding,) = encode_batch(tokenizer, [text], offsets=True)
        # The token of the entity's last character; of several, the last.
        firsts = np.asarray([a for a, _ in encoding.offsets], np.int64)
        last = np.asarray([end - 1 for _, end in spans], np.int64)
        if len(firsts):
            found = np.maximum(np.searchsorted(firsts, last, side="right") - 1, 0)
            places.append(start + found)
        documents.append(np.asarray([*encoding.ids, eos_id], np.int32))
        start += len(documents[-1])
    if not places or not sum(map(len, places)):
        raise UserError(f"--entities {shown(path)}: labels no entity")
    return array_store(documents, vocab_size), np.unique(np.concatenate(places))
