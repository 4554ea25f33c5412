"""What may be drawn, and how likely, in float64: each rule by its published definition.

Penalties, biases and bans as vLLM documents and orders them (vllm/v1/sample: allowed ids, bad
words, minimum of tokens, logit bias, repetition, frequency and presence penalty), min_p of arXiv
2407.01082, top_k, and top_p of arXiv 1904.09751.
"""

from __future__ import annotations

import numpy as np


def adjusted(
    logits,
    prompt=(),
    generated=(),
    *,
    allowed_ids=None,
    bad_words=(),
    logit_bias=(),
    min_tokens=0,
    ends=(),
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
):
    """float64 [V] from logits [V]; -inf for what must not be drawn."""
    x = np.array(logits, np.float64)
    generated = list(generated)
    for token in range(len(x)):
        if allowed_ids is not None and token not in allowed_ids:
            x[token] = -np.inf
    for *before, last in bad_words:
        if generated[len(generated) - len(before) :] == before and len(generated) >= len(before):
            x[last] = -np.inf
    if len(generated) < min_tokens:
        x[list(ends)] = -np.inf
    for token, bias in logit_bias:
        x[token] += bias
    for token in {*prompt, *generated}:
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    for token in set(generated):
        x[token] -= frequency_penalty * generated.count(token)
        x[token] -= presence_penalty
    return x


def probabilities(logits, temperature, *, min_p=0.0, top_k=0, top_p=1.0):
    """float64 [V]: of each token, after all that leaves tokens out; all logits different."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()
