"""Reading a `tokenizer.json`, and telling two tokenizers apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engram_jax.errors import UserError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer stored at `path`: a `tokenizer.json`, or a folder that holds one.

    Raises UserError naming the path when there is no such file or it does not hold a tokenizer.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"tokenizer {file}: no such file; give the path of a tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        reason = str(error).splitlines()[0]
        raise UserError(f"tokenizer {file}: not a tokenizer.json ({reason})") from error


def tokenizer_size(tokenizer: Tokenizer) -> int:
    """Number of ids, added tokens included: one more than the highest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of everything that turns text into ids and ids into text.

    Truncation and padding are left out, since programs set them as they go, and merges are read in
    both spellings ("a b" and ["a", "b"]) that versions of the library write.
    """
    state = json.loads(tokenizer.to_str())
    for set_at_run_time in ("truncation", "padding", "version"):
        state.pop(set_at_run_time, None)
    model: dict[str, Any] = state["model"]
    if "merges" in model:
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
