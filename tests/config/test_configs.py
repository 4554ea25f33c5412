"""The files under configs/: each can be run, says how, and is what was published."""

from __future__ import annotations

import ast
import dataclasses
import importlib

import pytest

from engram_jax import config as config_lib
from engram_jax.model.describe import describe
from tests.runs import CONFIGS, ROOT, configuration

PAPER = ("dense4b", "moe27b", "engram27b", "engram40b")


LONGER = {"engram27b_32k": "engram27b", "engram_tiny_2k": "engram_tiny"}


def test_the_documented_configurations_are_there():
    assert {*PAPER, *LONGER, "engram_tiny", "moe_tiny", "deepseek_v41_memory"} <= set(CONFIGS)


@pytest.mark.parametrize(("longer", "short"), LONGER.items())
def test_a_longer_stage_begins_with_the_short_model(longer, short):
    """All of the model but YaRN is the short one's, and its scale is what the context grows by, but
    the paper's: 10 for 8 times the tokens."""
    ours, theirs = configuration(longer), configuration(short)
    assert ours.train.init_from == f"runs/{short}"
    yarn = ours.model.attention.yarn
    assert yarn.original_length == theirs.data.seq_len
    grown = ours.data.seq_len / yarn.original_length
    assert yarn.scale == (10 if longer == "engram27b_32k" else grown) >= grown
    attention = dataclasses.replace(ours.model.attention, yarn=theirs.model.attention.yarn)
    assert dataclasses.replace(ours.model, attention=attention) == theirs.model
    assert ours.tokenizer == theirs.tokenizer


def test_the_papers_long_context_stage():
    """Paper, section 5: 32,768 tokens, 5,000 steps, 30 B tokens; YaRN with s 10, alpha 1, beta 32
    and f 0.707."""
    config = configuration("engram27b_32k")
    yarn, data = config.model.attention.yarn, config.data
    assert (yarn.scale, yarn.alpha, yarn.beta, yarn.mscale) == (10, 1, 32, 0.707)
    assert (data.seq_len, config.train.steps) == (32_768, 5000)
    assert data.seq_len * data.batch_size * config.train.steps == pytest.approx(30e9, rel=0.06)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_parses_and_is_named_after_itself(name):
    config = configuration(name)
    assert config.name == name
    assert config_lib.parse_config(config_lib.to_dict(config)) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_says_the_command_that_runs_it(name):
    text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    assert text is not None
    assert f"python launch.py --config=configs/{name}.py" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_returns_a_new_configuration(name):
    """They build upon each other: what one changes must not reach the next that asks."""
    module = importlib.import_module(f"configs.{name}")
    first = module.get_config()
    before = config_lib.parse_config(first)
    first.model.d_model += 1
    first.name = "changed"
    assert config_lib.parse_config(module.get_config()) == before


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models(name):
    """The paper's Table 1 and Appendix A, and what follows from them."""
    config = configuration(name)
    model, attention, ffn = config.model, config.model.attention, config.model.ffn
    assert (model.layers, model.d_model, model.hyper.streams) == (30, 2560, 4)
    assert (attention.heads, attention.kv_lora_rank, attention.rope_theta) == (32, 512, 10000.0)
    assert (attention.nope_dim, attention.rope_dim, attention.v_dim) == (128, 64, 128)
    assert (model.tie_embeddings, model.dtype, model.param_dtype) == (True, "bfloat16", "float32")
    assert (ffn.dense_dim, config.tokenizer.vocab_size) == (12_288, 129_280)
    assert (config.tokenizer.name, config.tokenizer.canonical_vocab_size) == ("deepseek-v3", 98_627)
    assert (config.data.seq_len, config.data.batch_size, config.train.steps) == (4096, 1280, 50_000)
    optimizer = config.optimizer
    assert (optimizer.peak_lr, optimizer.weight_decay, optimizer.warmup_steps) == (4e-4, 0.1, 2000)
    assert (optimizer.decay_at, optimizer.decay_factors) == ((0.8, 0.9), (0.316, 0.1))
    assert (optimizer.memory_lr_multiplier, optimizer.memory_optimizer) == (5.0, "rowwise_adam")
    if name == "dense4b":
        assert (ffn.dense_layers, ffn.routed_experts) == (30, 0)
    else:
        assert (ffn.dense_layers, ffn.shared_experts, ffn.top_k, ffn.expert_dim) == (1, 2, 6, 1536)
        assert ffn.routed_experts == {"moe27b": 72, "engram27b": 55, "engram40b": 55}[name]


@pytest.mark.parametrize(("name", "rows"), [("engram27b", 2_262_400), ("engram40b", 7_239_680)])
def test_the_papers_memories(name, rows):
    engram = configuration(name).model.engram
    assert engram.layers == (1, 14)  # 0-based: the paper's prose calls them 2 and 15
    assert (engram.orders, engram.heads_per_order, engram.d_mem) == ((2, 3), 8, 1280)
    assert (engram.rows_per_head, engram.dim) == ((rows,), 80)
    assert (engram.form, engram.hash_dialect, engram.conv_kernel) == ("paper", "paper", 4)


def test_the_released_memory():
    """DeepSeek-V4.1-Flash's configuration."""
    config = configuration("deepseek_v41_memory")
    engram, model = config.model.engram, config.model
    assert (engram.layers, engram.orders, engram.heads_per_order) == ((1, 14), (2, 3, 4), 8)
    assert (engram.rows_per_head, engram.dim, engram.form) == ((16_000_000,), 256, "v41")
    assert (model.d_model, model.hyper.streams, model.hyper.transpose) == (5120, 4, True)
    assert config.tokenizer.canonical_vocab_size == 99_092


def test_the_demo_and_its_baseline_are_of_one_size():
    """Parameters and FLOPs per token within half a percent: tables in exchange for experts."""
    demo, baseline = describe(configuration("engram_tiny")), describe(configuration("moe_tiny"))
    for figure in ("total_params", "active_params", "flops_per_token"):
        assert demo[figure] == pytest.approx(baseline[figure], rel=5e-3), figure
    assert demo["engram_params"] > 0.25 * demo["total_params"]
    assert baseline["engram_params"] == 0
    same = ("tokenizer", "data", "optimizer", "train", "generate")
    ours, theirs = configuration("engram_tiny"), configuration("moe_tiny")
    assert all(getattr(ours, section) == getattr(theirs, section) for section in same)
    assert (ours.model.layers, ours.model.attention) == (
        theirs.model.layers,
        theirs.model.attention,
    )
