"""lm-eval's model interface on a `Scorer`: texts to tokens and back, windows, limits.

Tokens are those of training (addressing/tokenizer.py): no token is put before a text, and special
tokens spelled in it are text unless config.serve.parse_special is set. Documents are trained on
apart, each with its end token; so that token is what stands before a text without a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.config.errors import UserError
from engram_jax.harness.scorer import Scorer
from engram_jax.serve.request import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

ANSWER = 256  # tokens, where a task does not say: as lm-eval's other models
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_KNOWN = ("until", "max_gen_toks", "do_sample", *_SAMPLING)


class EngineLM(TemplateLM):
    """A model that lm-eval can score. scorer: of process 0. warn: is given lines for the user."""

    def __init__(
        self, scorer: Scorer, tokenizer: Any, eos_id: int, warn: Callable[[str], None]
    ) -> None:
        super().__init__()
        # Not `tokenizer`: lm-eval expects one of transformers there.
        self._scorer, self._tokenizer, self._eos_id = scorer, tokenizer, eos_id
        self._warn = warn

    @property
    def eot_token_id(self) -> int:
        """Stands before a text that has no context."""
        return self._eos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self._scorer.longest

    @property
    def max_gen_toks(self) -> int:
        """Of an answer, where the task does not say."""
        return ANSWER

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **other: Any
    ) -> list[int]:
        """A text's ids; nothing is ever added."""
        return encode_batch(self._tokenizer, [string])[0].ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """For each context and continuation the log-likelihood of the latter (nats), and whether
        greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **other: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        self._tell_cut(sum(len(a) + len(b) > self.max_length + 1 for a, b in pairs), len(pairs))
        return self._scorer.score(pairs, "scoring")

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text (nats), in windows that overlap by one token."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self._eos_id, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scorer.score(pairs, "scoring"), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, before the first of its stop strings."""
        prompts, params, stops, cut = [], [], [], 0
        for number, request in enumerate(requests):
            context, given = request.args
            how, until = self._sampling(given, number)
            room = self.max_length - how.max_tokens
            tokens = self.tok_encode(context) or [self._eos_id]
            cut += len(tokens) > room
            prompts.append(tokens[-room:])
            params.append(how)
            stops.append(until)
        self._tell_cut(cut, len(prompts))
        texts = self._scorer.complete(prompts, params, "generating")
        return [_before(text, until) for text, until in zip(texts, stops, strict=True)]

    def _sampling(self, given: dict[str, Any], number: int) -> tuple[SamplingParams, list[str]]:
        """A task's generation_kwargs. number: of the request, the seed where tokens are drawn."""
        how = normalize_gen_kwargs(given, self.max_gen_toks)
        if unknown := sorted(how.keys() - set(_KNOWN)):
            raise UserError(
                f"generation_kwargs.{unknown[0]}: unknown; must be one of {', '.join(_KNOWN)}"
            )
        most = how["max_gen_toks"]
        if not 0 < most < self.max_length:
            raise UserError(
                f"generation_kwargs.max_gen_toks = {most}: must be from 1 to"
                f" {self.max_length - 1}; the model reads {self.max_length} tokens at once"
            )
        until = [stop for stop in how["until"] if stop]
        usable = [stop for stop in until if len(stop) <= MAX_STOP_LENGTH]
        named = {key: how[key] for key in _SAMPLING if how.get(key) is not None}
        if not how["do_sample"]:
            named = {key: named[key] for key in named if key == "repetition_penalty"}
        params = SamplingParams(
            max_tokens=most,
            stop=tuple(dict.fromkeys(usable))[:MAX_STOPS],
            seed=number,
            **named,
        )
        return params, until

    def _tell_cut(self, count: int, of: int) -> None:
        if count:
            self._warn(
                f"{count:,} of {of:,} requests are longer than the {self.max_length:,} tokens that"
                " the model reads at once: their beginnings were left out"
            )


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string: the engine knows no more than MAX_STOPS of them."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
