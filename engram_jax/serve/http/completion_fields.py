"""The names of a completion request's fields: honoured, without effect, refused.

No field that could change an answer is ignored: a name that is in no list here is refused.
docs/serving.md has the same lists for users.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from engram_jax.serve.http.json_fields import SHOWN, ApiError, Fields, shown

HONOURED = (
    *("model", "prompt", "max_tokens", "max_completion_tokens", "n", "best_of", "seed"),
    *("temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos", "stop"),
    *("stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words"),
    *("allowed_token_ids", "truncate_prompt_tokens", "truncation_side", "echo", "logprobs"),
    *("prompt_logprobs", "stream", "stream_options", "return_token_ids"),
    *("return_tokens_as_token_ids", "request_id", "cache_salt"),
)
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")

# Fields that cannot change an answer -> what they must be. Documents begin without a special token
# here, so `add_special_tokens` adds none; `spaces_between_special_tokens` means tokenizers that are
# written in Python.
WITHOUT_EFFECT: Mapping[str, type] = {
    **dict.fromkeys(("user", "safety_identifier", "session_id", "service_tier"), str),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), str),
    **dict.fromkeys(("store", "add_special_tokens", "spaces_between_special_tokens"), bool),
    "metadata": dict,
}
_KIND: Mapping[type, str] = {str: "a text", bool: "true or false", dict: "an object"}

# Fields that would change the answer if they were honoured -> values that change nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "suffix": ("",),
    "response_format": ({}, {"type": "text"}),
    "moderation": (),
    # vLLM
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "priority": (0,),
    "stream_interval": (1,),
    "watermarking": (False,),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "return_token_offsets": (False,),
    **dict.fromkeys(("structured_outputs", "structural_tag", "prompt_embeds"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), ()),
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params"), ({},)),
    **dict.fromkeys(("logprob_token_ids", "repetition_detection", "thinking_token_budget"), ()),
    # other servers
    "do_sample": (True,),
    "num_beams": (1,),
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    **dict.fromkeys(("top_a", "epsilon_cutoff", "eta_cutoff", "dynatemp_range"), (0,)),
    **dict.fromkeys(("tfs_z", "smoothing_factor", "penalty_alpha"), ()),
    **dict.fromkeys(("grammar", "json_schema", "regex", "ebnf"), ()),
}
CHAT = (
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    *("modalities", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"),
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "documents"),
    *("continue_final_message", "include_reasoning"),
)
# Names that are not like the one they mean.
INSTEAD: Mapping[str, str] = {
    "top_logprobs": "logprobs",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "typical": "typical_p",
    "inputs": "prompt",
    "input": "prompt",
    "text": "prompt",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "random_seed": "seed",
}


def check_fields(fields: Fields) -> None:
    """Raises ApiError for the first field that is not served as it is."""
    for name in fields.names:
        if name in WITHOUT_EFFECT:
            kind = WITHOUT_EFFECT[name]
            if not (fields.get(name) is None or isinstance(fields.get(name), kind)):
                fields.wrong(name, f"{_KIND[kind]}; it has no effect")
        elif name in UNSUPPORTED:
            fields.unsupported(name, UNSUPPORTED[name])
        elif name in CHAT:
            message = f"{name}: is a field of chat, and base models have no chat template"
            raise ApiError(400, message, name, "unsupported_parameter")
        elif name not in HONOURED:
            _unknown(name, [*HONOURED, *WITHOUT_EFFECT, *UNSUPPORTED])
    known = [f"stream_options.{name}" for name in STREAM_OPTIONS]
    options = fields.inner("stream_options")
    for name in options.names:
        if name not in known:
            _unknown(name, known)
    options.unsupported("stream_options.include_obfuscation", (False,))


def only(fields: Fields, *known: str) -> None:
    """Raises ApiError for a field that is none of `known`."""
    for name in fields.names:
        if name not in known:
            _unknown(name, known)


def _unknown(name: str, known: Sequence[str]) -> None:
    near = [INSTEAD[name]] if INSTEAD.get(name) in known else []
    if len(name) <= SHOWN and not near:  # a long one would take long
        near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else "docs/serving.md lists the fields"
    text = shown(name)[1:]  # printable, whatever it is
    text = text if text.endswith("...") else text[:-1]
    message = f"{text or repr(name)}: is no known field; {hint}"
    raise ApiError(400, message, text, "unknown_parameter")
