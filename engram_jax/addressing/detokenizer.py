"""Streaming detokenizer: token ids to text one at a time, equal to `Tokenizer.decode` of them all.

The library decodes whole lists. A growing text cannot be decoded again at every token, nor in
parts: a decoder may drop the first space, join bytes to characters, or change its earlier output.
So each decoder of the library is a stage here that takes the tokens' strings ("pieces") one by one,
emits the text that no later piece can change, and holds the rest.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from tokenizers import Tokenizer, decoders

BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

Pieces = list[str]


class Detokenizer:
    """The text of one sequence of tokens, as far as it is final.

    length: characters emitted so far.
    """

    def __init__(self, tokenizer: Tokenizer, *, inside: bool = False):
        """inside: decode as if text came before: nothing is treated as the beginning."""
        self._tokenizer = tokenizer
        stages, self._special = _plan(tokenizer)
        self._stages = [make() for make in stages]
        self.length = 0
        for stage in self._stages if inside else ():
            stage.begun = True

    @property
    def inside(self) -> bool:
        """Whether the next token is decoded as following text, not as at the beginning."""
        for stage in self._stages:
            if not stage.begun or stage.holds:
                return stage.begun
        return True

    def push(self, token: int, skip_special_tokens: bool = True) -> tuple[str, str]:
        """(text of earlier tokens that is final now, text of this one that is final).

        This token's text begins between the two. Unknown ids have no text.
        """
        piece = self._tokenizer.id_to_token(token)
        if piece is None or (skip_special_tokens and piece in self._special):
            return "", ""
        before, own = self._through(self._stages, [], [piece])
        self.length += len(before) + len(own)
        return before, own

    def flush(self) -> str:
        """The remaining text, after the last token."""
        rest = ""
        for number, stage in enumerate(self._stages):
            rest += "".join(self._through(self._stages[number + 1 :], stage.end(), []))
        self.length += len(rest)
        return rest

    @staticmethod
    def _through(stages: list[_Stage], before: Pieces, own: Pieces) -> tuple[str, str]:
        for stage in stages:
            settled: Pieces = []
            fresh: Pieces = []
            for piece in before:
                settled += [p for part in stage.feed(piece) for p in part]
            for number, piece in enumerate(own):
                held, new = stage.feed(piece)
                (fresh if number else settled).extend(held)
                fresh += new
            before, own = settled, fresh
        return "".join(before), "".join(own)


def follows_text(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a token after this prompt is decoded as following text, not as at the beginning."""
    one = Detokenizer(tokenizer)
    for token in prompt:
        if one.inside:
            break
        one.push(token)
    return one.inside


def text_of(tokenizer: Tokenizer, token: int, inside: bool = True) -> str:
    """A token's text, special tokens included; inside: after other text, else at the beginning."""
    one = Detokenizer(tokenizer, inside=inside)
    return "".join(one.push(token, skip_special_tokens=False)) + one.flush()


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The bytes of a token that alone is no valid text (a byte, part of a character), else None."""
    piece = tokenizer.id_to_token(token) or ""
    kinds = _plan(tokenizer)[0]
    if _ByteFallback in kinds and (match := _BYTE_TOKEN.fullmatch(piece)):
        return bytes.fromhex(match[1])
    if _ByteLevel in kinds:
        data = _byte_level(piece)
        try:
            data.decode()
        except UnicodeDecodeError:
            return data
    return None


class _Stage:
    """One decoder of the library, and the pieces it holds."""

    begun = True  # False while the next piece is treated as the beginning of the text
    holds = False  # whether the next piece may release held ones to the later stages

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        """(held text of earlier pieces that is final now, text of this piece that is final)."""
        raise NotImplementedError

    def end(self) -> Pieces:
        """The held text, when nothing follows."""
        return []


class _Each(_Stage):
    """Replace, Strip: every piece independently."""

    def __init__(self, decoder: Any):
        self._decoder = decoder

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        return [], [self._decoder.decode([piece])]


class _FirstApart(_Stage):
    """Metaspace, WordPiece: the first piece has no space before it."""

    def __init__(self, decoder: Any):
        self._decoder, self.begun = decoder, False

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        pieces, self.begun = (["", piece] if self.begun else [piece]), True
        return [], [self._decoder.decode(pieces)]


class _Spaced(_Stage):
    """No decoder: the library puts a space between tokens."""

    def __init__(self) -> None:
        self.begun = False

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        text, self.begun = (" " + piece if self.begun else piece), True
        return [], [text]


class _LastApart(_Stage):
    """BPEDecoder: an end of word is a space, but none at the end of the text."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._held: str | None = None

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        held, self._held = self._held, piece
        return [] if held is None else [self._decoder.decode([held, ""])], []

    def end(self) -> Pieces:
        return [] if self._held is None else [self._decoder.decode([self._held])]


class _Ctc(_Stage):
    """CTC: only the first of equal consecutive pieces."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._previous: str | None = None

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        previous, self._previous = self._previous, piece
        text = "" if piece == previous else self._decoder.decode([piece])
        return [], [text] if text else []


class _ByteLevel(_Stage):
    """GPT-2's byte characters: holds the start of an incomplete character, at most three bytes."""

    _waiting = b""

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        data, settled = _byte_level(piece), []
        if self._waiting and len((self._waiting + data[:1]).decode(errors="replace")) > 1:
            settled, self._waiting = self.end(), b""  # this byte does not continue the character
        data = self._waiting + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._waiting = data[used:]
        return settled, [text]

    def end(self) -> Pieces:
        return [self._waiting.decode(errors="replace")]


class _ByteFallback(_Stage):
    """Tokens <0xE2>: a run of them is valid UTF-8, or each is one broken character."""

    _row = b""

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        if match := _BYTE_TOKEN.fullmatch(piece):
            self._row += bytes.fromhex(match[1])
            return [], []
        settled, self._row = self.end(), b""
        return settled, [piece]

    @property
    def holds(self) -> bool:  # type: ignore[override]
        return bool(self._row)

    def end(self) -> Pieces:
        try:
            return [self._row.decode()] if self._row else []
        except UnicodeDecodeError:
            return [BROKEN] * len(self._row)


class _StripEnds(_Stage):
    """Strip after Fuse: at the beginning and at the end of the whole text."""

    def __init__(self, content: str, start: int, stop: int):
        self._content, self._start, self._stop = content, start, stop
        self.begun = start == 0
        self._held = ""

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        while not self.begun and piece:
            if piece[0] == self._content:
                piece, self._start = piece[1:], self._start - 1
                self.begun = self._start == 0
            else:
                self.begun = True
        text, waited = self._held + piece, len(self._held)
        end = max(len(text.rstrip(self._content)), len(text) - self._stop)
        self._held = text[end:]
        return [text[: min(waited, end)]], [text[waited:end]]


class _Whole(_Stage):
    """A decoder that reads the whole text at once: nothing is final before the end."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._held: Pieces = []

    def feed(self, piece: str) -> tuple[Pieces, Pieces]:
        self._held.append(piece)
        return [], []

    def end(self) -> Pieces:
        return [self._decoder.decode(["".join(self._held)])]


@lru_cache(maxsize=8)
def _plan(tokenizer: Tokenizer) -> tuple[list[Callable[[], _Stage]], frozenset[str]]:
    """(constructors of its decoder's stages; the strings of its special tokens)."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = frozenset(token.content for token in added if token.special)
    if tokenizer.decoder is None:
        return [_Spaced], special
    stages: list[Callable[[], _Stage]] = []
    fused = False  # whether the pieces have been joined to one text
    for state in _flat(json.loads(tokenizer.decoder.__getstate__())):
        kind = state["type"]
        if kind != "Fuse":
            stages.append(_stage(kind, state, fused))
        fused = fused or kind in ("Fuse", "ByteLevel")
    return stages, special


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [one for inner in state["decoders"] for one in _flat(inner)]


def _stage(kind: str, state: dict[str, Any], fused: bool) -> Callable[[], _Stage]:
    if kind == "Strip" and fused:
        return partial(_StripEnds, state["content"], state["start"], state["stop"])
    decoder = _library_decoder(state)
    if fused:  # only a replacement of single characters does not need the whole text
        one = len(state.get("pattern", {}).get("String", "")) == 1
        return partial(_Each if one else _Whole, decoder)
    if kind in ("ByteFallback", "ByteLevel"):
        return _ByteFallback if kind == "ByteFallback" else _ByteLevel
    apart = {"Metaspace": _FirstApart, "WordPiece": _FirstApart, "BPEDecoder": _LastApart}
    return partial({**apart, "CTC": _Ctc, "Replace": _Each, "Strip": _Each}[kind], decoder)


def _library_decoder(state: dict[str, Any]) -> Any:
    made: Any = decoders.Fuse()  # any class will do: the state decides which decoder it becomes
    made.__setstate__(json.dumps(state).encode())
    return made


@lru_cache
def _byte_of() -> dict[str, int]:
    """GPT-2's printable characters for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    """The bytes of a piece; one with other characters (a special token) is its own text."""
    known = _byte_of()
    return bytes(known[c] for c in piece) if all(c in known for c in piece) else piece.encode()
