"""Gates on a text as a batch, against those of the document alone."""

from __future__ import annotations

import numpy as np

from engram_jax.analysis.gates import gates_of_document, gates_of_text
from engram_jax.training.state import weights_of
from tests.tiny import tiny
from tests.tokenizer_kinds import kind


def test_by_branch_as_of_the_document():
    program, state = tiny()
    tokenizer, rng = kind("byte-level BPE"), np.random.default_rng(0)
    for length in (20, 7):  # a whole sequence, and one with padding behind
        ids = rng.integers(1, 61, length).tolist()
        variables = state.params, state.router_bias, state.memory
        found = gates_of_text(program, variables, tokenizer, ids)
        strings, means = gates_of_document(program, weights_of(program, state), tokenizer, ids)
        assert (found.layers, found.tokens) == (("1",), strings)
        assert found.gates.shape == (1, length, program.config.model.hyper.streams)
        np.testing.assert_allclose(found.gates.mean(axis=2), means, atol=1e-5)
        assert np.ptp(found.gates, axis=2).max() > 1e-3
