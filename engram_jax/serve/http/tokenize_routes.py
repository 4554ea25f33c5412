"""Text to token ids and back, as the completions route does it; vLLM's routes and forms."""

from __future__ import annotations

from typing import Any

from engram_jax.addressing import tokenizer_size
from engram_jax.serve.http.completion_fields import only
from engram_jax.serve.http.json_fields import ApiError, Fields, is_id


def tokenize(fields: Fields, tokenizer: Any, capacity: int) -> dict[str, Any]:
    """The ids that a prompt of this text has. `token_strs`, if asked for: the vocabulary's pieces.

    Raises ApiError.
    """
    only(fields, "model", "prompt", "add_special_tokens", "return_token_strs")
    _need(tokenizer)
    fields.boolean("add_special_tokens")  # documents begin without any
    pieces = fields.boolean("return_token_strs")
    text = fields.text("prompt", fields.get("prompt"), "a text")
    found = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    return {
        "count": len(found.ids),
        "max_model_len": capacity,
        "tokens": found.ids,
        "token_strs": found.tokens if pieces else None,
    }


def detokenize(fields: Fields, tokenizer: Any, capacity: int) -> dict[str, Any]:
    """The text of ids, special tokens included. Raises ApiError."""
    only(fields, "model", "tokens")
    _need(tokenizer)
    ids, most = fields.get("tokens"), tokenizer_size(tokenizer) - 1
    if not isinstance(ids, list) or not all(map(is_id, ids)):
        fields.wrong("tokens", "a list of token ids")
    for token in ids:
        if token > most or tokenizer.id_to_token(token) is None:  # ids may have gaps
            allowed = f"an id of the tokenizer, 0 to {most}"
            raise ApiError(400, f"tokens: token id {token}: must be {allowed}", "tokens")
    return {"prompt": tokenizer.decode(ids, skip_special_tokens=False)}


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ApiError(400, "the server has no tokenizer: it takes and gives token ids only")
