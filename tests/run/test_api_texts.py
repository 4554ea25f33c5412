"""Texts and equal budgets from Python: what launch.py's modes say of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engram_jax import api
from tests.runs import ROOT, launched, small_config


def test_the_text_is_that_of_a_run(corpus, undisturbed):
    heard = []
    text = api.open_text(small_config(corpus), heard.append)
    run = api.open_run(undisturbed)
    for mine, held_out in ((text.train, False), (text.held_out, True)):
        theirs = api.run_documents(run, held_out)
        assert len(mine) == len(theirs) > 1
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == np.int32 and np.array_equal(a, b)
    assert text.tokenizer.to_str() == run.model.tokenizer.to_str()
    told = json.loads((undisturbed / "run.json").read_text())["launches"][0]["data"]
    assert text.bytes_per_token == told["validation_bytes_per_token"]
    assert text.description == told["source"]
    assert any(line.startswith("data: ") and "tokens to train on" in line for line in heard)


def test_a_budget_is_that_of_describe():
    files = [ROOT / "configs" / f"{name}.py" for name in ("engram_tiny", "moe_tiny")]
    flags = f"--config={files[0]}", f"--base={files[1]}", "--mode=describe", "--json"
    told = json.loads(launched(*flags).out)["budget"]
    mine, base = (api.budget(file) for file in files)
    assert (mine.total, mine.active, mine.sparse) == (
        told["P_tot"],
        told["P_act"],
        told["P_sparse"],
    )
    assert mine.rho == told["rho"] and mine.flops == told["flops_per_token"]
    assert mine.mismatch(base) == told["mismatch"]


@pytest.mark.parametrize("rho", [0.45, 0.8])
def test_a_solved_model_has_the_budget(rho):
    base, variant = (ROOT / "configs" / f"{name}.py" for name in ("moe_tiny", "engram_tiny"))
    solved = api.solve(base, variant, rho)
    found, wanted = api.budget(solved), api.budget(base)
    off = found.mismatch(wanted)
    assert abs(off["total"]) < 1e-3 and abs(off["active"]) < 1e-3 and abs(off["flops"]) < 5e-3
    assert found.rho == pytest.approx(rho, abs=0.03)  # experts are whole
    assert solved.model.engram.layers == api.configure(variant).model.engram.layers
    # The other rule leaves the width alone.
    assert api.solve(base, variant, rho, "paper").model.ffn.dense_dim == 384
