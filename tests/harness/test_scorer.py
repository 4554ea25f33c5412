"""Which prompts score which pairs, and in what order; values of the plain forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.harness.scorer import Scorer, prompts_of
from engram_jax.serve.request import MAX_NEXT
from tests.serve.served import SERVE, full_logits, logprobs, prompts
from tests.tiny import VOCAB


def plain(context, continuation, longest=SERVE.capacity):
    """(sum of log-probabilities, greedy) by the uncached forward pass over the last tokens."""
    whole = [*context, *continuation][-longest - 1 :]
    values, places = logprobs(full_logits(whole[:-1])), range(len(whole) - 1)
    places = places[-len(continuation) :]
    wanted = values[places, whole[-len(continuation) :]].sum()
    return wanted, values[places].argmax(-1).tolist() == list(continuation)


def test_scores_are_those_of_the_plain_forward_pass(engine):
    """Choices of one context that differ in the last token, in length, in all; contexts that end
    where a page does; one of a single token; one that is too long; what greedy decoding gives."""
    long, page, one, other = prompts([90, 16, 1, 21], seed=3)
    greedy = []
    for _ in range(3):
        greedy.append(int(full_logits([*other, *greedy])[-1].argmax()))
    pairs = [(other, [token]) for token in range(VOCAB)]  # more than a prompt can have
    pairs += [(other, end) for end in ([1, 2, 3], [1, 2, 4], [1], greedy, greedy[:2])]
    pairs += [(other, [*greedy[:2], (greedy[2] + 1) % VOCAB])]
    pairs += [(page, [5]), (page, [5, 6, 7]), (one, [9]), (long, [4]), (long, [3, 4])]
    pairs += [(one, prompts([64], seed=4)[0])]  # the longest there can be
    found = Scorer(engine).score(pairs)
    wanted = [plain(*pair) for pair in pairs]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in wanted], atol=1e-4)
    assert [g for _, g in found] == [g for _, g in wanted]
    assert [g for _, g in found[VOCAB:]].count(True) == 2 and found[VOCAB + 3][1]


def test_choices_share_a_prompt_where_only_their_last_tokens_differ():
    context = tuple(range(10))
    pairs = [(context, [n]) for n in range(4)] + [(context, [7, 8])] + [(context[:9], [9, 1])]
    first, second = prompts_of(pairs, longest=64, unit=4)
    assert first.tokens == (*context, 7) and first.pairs == [(4, 10, 8)]
    assert second.tokens == context and second.first == 9
    assert second.pairs == [*((n, 10, n) for n in range(4)), (5, 9, 1)]
    many = prompts_of([(context, [n]) for n in range(MAX_NEXT + 1)], longest=64, unit=4)
    assert [len(prompt.pairs) for prompt in many] == [MAX_NEXT, 1]


def test_what_begins_alike_is_together_the_longest_first():
    """So the pages of a context, and of examples before several, are there when they are needed."""
    shots = (1, 1, 1, 1)
    pairs = [
        ((5,) * 7, [0, 1]),
        ((*shots, 2, 2), [0, 1]),
        ((9,) * 20, [0, 1]),
        ((*shots, *[3] * 8), [0, 1]),
        ((5,) * 7, [1, 1]),
        ((*shots, 2, 2), [1, 0, 1]),
    ]
    order = [prompt.pairs[0][0] for prompt in prompts_of(pairs, longest=64, unit=4)]
    assert order == [2, 3, 1, 5, 0, 4]


def test_a_long_context_loses_its_beginning():
    (prompt,) = prompts_of([(range(100), [7, 8])], longest=10, unit=4)
    assert prompt.tokens == (*range(91, 100), 7) and prompt.pairs == [(0, 9, 8)]


@pytest.mark.parametrize("pair", [((1,), ()), ((1,), (2,) * 11), ((), (1,))])
def test_refused(pair):
    with pytest.raises(UserError, match="continuation"):
        prompts_of([pair], longest=10, unit=4)
