"""Every key of a configuration: which values are refused, by one line that says what is allowed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engram_jax import config as config_lib
from engram_jax.config import QWEN
from tests.hostile.test_trainer_settings import CASES
from tests.runs import Outcome, launched, refused, small_run


def described(overrides: dict[str, Any]) -> Outcome:
    """--mode=describe of the small model with something else."""
    return launched(*small_run(Path("/none"), Path("/none/run"), **overrides), "--mode=describe")


# Override -> what the line must say besides the key. The model (runs.SMALL) has 2 layers, memory at
# layer 1 with 2 orders x 2 heads and d_mem 16, 4 experts, batches of 4, a vocabulary of 300.
IMPOSSIBLE = [
    # Values of another type than the key's.
    ("model.layers=x", "'x'", "a whole number"),
    ("model.layers=2.0", "'2.0'", "a whole number"),
    ("train.steps=1e3", "'1e3'", "a whole number"),
    ("train.steps=", "''", "a whole number"),
    ("optimizer.peak_lr=fast", "'fast'", "a number"),
    ("model.tie_embeddings=maybe", "'maybe'", "true or false"),
    ("model.engram.layers=(1, 'b')", "'b'", "a whole number"),
    ("model.engram.layers=(1.5,)", "1.5", "a whole number"),
    ("model.engram.layers=(True,)", "True", "a whole number"),
    ("model.engram.layers=(1 3)", "'(1 3)'", "a list"),
    ("train.samples=(1,)", "1", "text"),
    ("optimizer.decay_at=('late',)", "'late'", "a number"),
    # Numbers that are none.
    ("optimizer.peak_lr=nan", "nan", "finite"),
    ("optimizer.peak_lr=inf", "inf", "finite"),
    ("optimizer.decay_factors=(0.3, 1e999)", "inf", "finite"),
    ("model.norm_eps=inf", "inf", "finite"),
    ("optimizer.clip_norm=-inf", "-inf", "finite"),
    # Sizes of nothing.
    ("model.d_model=0", "0", "positive"),
    ("train.seen_tokens=-1", "-1", "0 or more"),
    ("train.hang_seconds=-1", "-1", "0 or more"),
    ("model.layers=0", "0", "positive"),
    ("model.layers=-4", "-4", "positive"),
    ("model.init_std=0", "0", "positive"),
    ("model.norm_eps=0", "0", "positive"),
    ("model.attention.heads=0", "0", "positive"),
    ("model.attention.kv_lora_rank=0", "0", "positive"),
    ("model.attention.nope_dim=0", "0", "positive"),
    ("model.attention.rope_dim=0", "0", "positive"),
    ("model.attention.v_dim=-1", "-1", "positive"),
    ("model.attention.rope_theta=0", "0", "positive"),
    ("model.attention.yarn.original_length=0", "0", "positive"),
    ("model.attention.yarn.alpha=0", "0", "positive"),
    ("model.attention.yarn.mscale=-1", "-1", "0 or more"),
    ("model.attention.yarn.scale=0.5", "0.5", "1 (no extension) or more"),
    ("model.attention.yarn.beta=1", "1", "above model.attention.yarn.alpha = 1"),
    ("model.hyper.streams=0", "0", "positive"),
    ("model.hyper.sinkhorn_iterations=0", "0", "positive"),
    ("model.hyper.eps=-1", "-1", "0 or more"),
    ("model.engram.conv_kernel=-1", "-1", "0 or more"),
    ("model.engram.gate=open", "'open'", "'context', 'one', 'learned'"),
    ("model.engram.multi_branch=maybe", "'maybe'", "true or false"),
    ("model.engram.lookup=random", "'random'", "'hashed', 'one_row', 'shuffled'"),
    ("model.engram.signs=maybe", "'maybe'", "true or false"),
    ("model.engram.compression=maybe", "'maybe'", "true or false"),
    ("model.engram.case=maybe", "'maybe'", "true or false"),
    ("model.engram.init_std=-0.1", "-0.1", "0 or more"),
    ("model.engram.seed=-1", "-1", "0 or more"),
    ("tokenizer.vocab_size=0", "0", "positive"),
    ("data.seq_len=0", "0", "positive"),
    ("data.batch_size=0", "0", "positive"),
    ("data.workers=-1", "-1", "0 or more"),
    ("data.max_megabytes=-1", "-1", "0 or more"),
    ("data.max_document_bytes=10", "10", "64 or more"),
    ("data.near_duplicates=1.5", "1.5", "in [0, 1]"),
    ("data.long_share=0.5", "0.5", "0 without data.keep_long"),
    ("data.long_share=1", "1", "less than 1"),
    ("data.tasks.names=chess", "('chess',)", "different ones of facts, needle"),
    ("data.tasks.difficulties=hard", "('hard',)", "left out while data.tasks.names is empty"),
    ("data.tasks.share=0.5", "0.5", "left out while data.tasks.names is empty"),
    ("data.tasks.frequencies=(2, 8)", "(2, 8)", "left out while data.tasks.names is empty"),
    ("data.tasks.test_items=7", "7", "left out while data.tasks.names is empty"),
    ("data.tasks.seed=3", "3", "left out while data.tasks.names is empty"),
    ("train.steps=0", "0", "positive"),
    ("train.accumulation=0", "0", "positive"),
    ("train.keep=0", "0", "positive"),
    ("train.keep_best=-1", "-1", "0 or more"),
    ("train.log_every=0", "0", "positive"),
    ("train.eval_every=0", "0", "positive"),
    ("train.eval_batches=0", "0", "positive"),
    ("train.checkpoint_every=0", "0", "positive"),
    ("train.sample_tokens=0", "0", "positive"),
    ("generate.max_tokens=0", "0", "positive"),
    # Seeds that a generator would cut off.
    ("train.seed=-1", "-1", "in [0, 2**32)"),
    ("data.seed=4294967296", "4294967296", "in [0, 2**32)"),
    ("generate.seed=-7", "-7", "in [0, 2**32)"),
    # Names that nothing has.
    ("model.dtype=float16", "'float16'", "'float32', 'bfloat16'"),
    ("model.param_dtype=bfloat16", "'bfloat16'", "'float32'"),
    ("model.remat=full", "'full'", "'none', 'block', 'dots'"),
    ("model.kept=('outputs',)", "('outputs',)", "left out without model.remat = 'block'"),
    ("model.hyper.start=random", "'random'", "'identity', 'uniform'"),
    ("model.engram.form=v3", "'v3'", "'paper', 'v41', 'qwen'"),
    ("model.engram.hash_dialect=v41", "'v41'", "'paper', 'qwen'"),
    ("model.engram.addresses=gpu", "'gpu'", "'device', 'host'"),
    ("model.engram.table_dtype=float16", "'float16'", "'float32', 'bfloat16'"),
    ("model.engram.precision=int8", "'int8'", "'model', 'bf16', 'fp8'"),
    ("model.engram.fp8_recipe=row", "'row'", "'channel', 'block', 'mx'"),
    ("model.kernels=triton", "'triton'", "'auto', 'reference', 'pallas'"),
    ("data.source=web", "'web'", "'local', 'folder', 'tfds'"),
    ("optimizer.memory_optimizer=adam", "'adam'", "'rowwise_adam', 'dense_adam'"),
    ("name=", "''", "letters"),
    ("name=a/b", "'a/b'", "names the run's folder"),
    ("name=../up", "'../up'", "names the run's folder"),
    # What does not go together.
    ("model.attention.rope_dim=7", "7", "even"),
    ("model.engram.d_mem=18", "18", "a multiple of", "2 x 2 = 4"),
    ("model.engram.d_mem=-8", "-8", "positive"),
    ("model.engram.heads_per_order=0", "0", "positive"),
    ("model.engram.heads_per_order=3", "config.model.engram.d_mem = 16", "2 x 3 = 6"),
    ("model.engram.layers=(0, 2)", "(0, 2)", "0-based", "model.layers = 2"),
    ("model.engram.layers=(-1,)", "(-1,)", "0-based"),
    ("model.engram.layers=(1, 0)", "(1, 0)", "ascending"),
    ("model.engram.layers=(1, 1)", "(1, 1)", "ascending"),
    ("model.layers=1", "config.model.ffn.dense_layers = 1", "model.layers = 1"),
    ("model.engram.orders=()", "()", "consecutive"),
    ("model.engram.orders=(2, 4)", "(2, 4)", "consecutive"),
    ("model.engram.orders=(1, 2)", "(1, 2)", "from 2 up"),
    ("model.engram.orders=(3, 4)", "(3, 4)", "from 2 up"),
    ("model.engram.orders=(3, 2)", "(3, 2)", "consecutive"),
    ("model.engram.rows_per_head=()", "()", "one number, or 2"),
    ("model.engram.rows_per_head=(100, 100, 100)", "(100, 100, 100)", "one number, or 2"),
    ("model.engram.rows_per_head=1", "(1,)", "in [2, 1073741824]"),
    ("model.engram.rows_per_head=-5", "(-5,)", "in [2, 1073741824]"),
    ("model.engram.rows_per_head=2000000000", "(2000000000,)", "in [2, 1073741824]"),
    ("model.engram.rows_per_head=600000000", "(600000000,)", "1879048192", "2400000000"),
    ("model.engram.rows_per_head=469762049", "(469762049,)", "1879048192", "1879048196"),
    ("data.batch_size=4194305", "4194305", "at most 4194304", "268435456 rows"),
    ("model.product_keys.layers=(2,)", "(2,)", "0-based", "model.layers = 2"),
    ("model.product_keys.layers=(1, 0)", "(1, 0)", "ascending"),
    ("model.product_keys.sub_keys=0", "0", "positive"),
    ("model.product_keys.sub_keys=46341", "46341", "to 1879048192 (int32)"),
    ("model.product_keys.sub_keys=7", "config.model.product_keys.top_k = 8", "sub_keys = 7"),
    ("model.product_keys.key_dim=7", "7", "even"),
    ("model.product_keys.heads=0", "0", "positive"),
    ("model.product_keys.heads=513", "config.model.product_keys.sub_keys = 64", "from 4104"),
    ("model.product_keys.top_k=65", "65", "at most model.product_keys.sub_keys = 64"),
    ("model.product_keys.dim=0", "0", "positive"),
    ("model.product_keys.expansion=3", "3", "a divisor of model.product_keys.sub_keys = 64"),
    ("model.engram.form=scone", "config.model.engram.layers = (1,)", "(0,) in form 'scone'"),
    ("model.ffn.top_k=5", "5", "in [1, 4]", "routed_experts = 4"),
    ("model.ffn.top_k=0", "0", "in [1, 4]"),
    ("model.ffn.expert_dim=0", "0", "positive"),
    ("model.ffn.routed_experts=-1", "-1", "0 or more"),
    ("model.ffn.bias_update_rate=-1", "-1", "0 or more"),
    ("model.ffn.routed_experts=1", "config.model.ffn.top_k = 2", "in [1, 1]"),
    ("model.ffn.shared_experts=-1", "-1", "0 or more"),
    ("model.ffn.dense_dim=0", "0", "positive"),
    ("model.ffn.dense_layers=3", "3", "in [0, 1]", "model.layers = 2"),
    ("model.ffn.dense_layers=2", "2", "in [0, 1]", "4 routed experts"),
    ("model.ffn.dense_layers=-1", "-1", "in [0, 1]"),
    ("model.ffn.routed_scaling=0", "0", "positive"),
    ("tokenizer.pad_id=300", "300", "in [0, 300)"),
    ("tokenizer.pad_id=-1", "-1", "in [0, 300)"),
    ("tokenizer.eos_id=-2", "-2", "in [-1, 300)"),
    ("tokenizer.canonical_vocab_size=301", "301", "in [0, 300]"),
    ("tokenizer.canonical_vocab_size=-1", "-1", "in [0, 300]"),
    ("model.engram.hash_dialect=qwen", "config.tokenizer.eos_id = -1", "'qwen' restarts there"),
    ("data.path=", "''", "the folder"),
    ("data.source=local", "config.data.path = '/none'", "data.source=folder"),
    ("data.text_key=", "''", "not empty"),
    ("data.validation_fraction=0", "0", "between 0 and 1"),
    ("data.validation_fraction=1", "1", "between 0 and 1"),
    ("train.accumulation=3", "3", "a divisor of data.batch_size = 4"),
    ("train.accumulation=8", "8", "a divisor of data.batch_size = 4"),
    ("train.samples=('a', '')", "('a', '')", "not empty"),
    ("train.samples=('a', '\udcff')", r"('a', '\udcff')", "UTF-8"),
    ("mesh.data=0", "0", "positive"),
    ("mesh.sequence=0", "0", "positive"),
    ("mesh.expert=0", "0", "positive"),
    ("mesh.tensor=0", "0", "positive"),
    ("mesh.fsdp=-1", "-1", "0 or more"),
    ("mesh.headroom=0", "0", "positive"),
    ("mesh.distinct=1.5", "1.5", "in [0, 1]"),
    ("optimizer.peak_lr=0", "0", "positive"),
    ("optimizer.clip_norm=0", "0", "positive"),
    ("optimizer.adam_b1=1", "1", "in [0, 1)"),
    ("optimizer.adam_b2=-0.1", "-0.1", "in [0, 1)"),
    ("optimizer.muon_momentum=1.5", "1.5", "in [0, 1)"),
    ("optimizer.muon_ns_steps=0", "0", "positive"),
    ("optimizer.muon_rms=0", "0", "positive"),
    ("optimizer.adam_eps=0", "0", "positive"),
    ("optimizer.warmup_steps=-1", "-1", "0 or more"),
    ("optimizer.weight_decay=-0.1", "-0.1", "0 or more"),
    ("optimizer.memory_lr_multiplier=-1", "-1", "0 or more"),
    ("optimizer.decay_at=(0.9, 0.8)", "(0.9, 0.8)", "ascending"),
    ("optimizer.decay_at=(0.8, 1.2)", "(0.8, 1.2)", "in [0, 1]"),
    ("optimizer.decay_at=(0.8,)", "config.optimizer.decay_factors", "one for each of"),
    ("optimizer.decay_factors=(0.3, -1)", "(0.3, -1.0)", "0 or more"),
    ("generate.temperature=-1", "-1", "0 or more"),
    ("generate.top_p=0", "0", "in (0, 1]"),
    ("generate.top_p=1.1", "1.1", "in (0, 1]"),
    ("generate.top_k=-1", "-1", "in [0, 300]"),
    ("generate.top_k=301", "301", "in [0, 300]"),
    # Keys that are none.
    ("trian.steps=5", "unknown key 'trian'", "did you mean --config.train.steps?"),
    ("train.step=5", "unknown key 'step'", "did you mean --config.train.steps?"),
    ("train.x=5", "unknown key 'x'", "config.train has steps"),
    ("train.steps.many=5", "unknown key 'many'", "config.train.steps is a value"),
    ("serve.sequences=0", "0", "positive"),
    ("serve.capacity=-1", "-1", "0 or more"),
    ("serve.page=0", "0", "positive"),
    ("serve.pages=-1", "-1", "0 or more"),
    ("serve.prefill_chunk=0", "0", "positive"),
    ("serve.prefill_sequences=9", "9", "at most serve.sequences = 8"),
    ("serve.queue=0", "0", "positive"),
    ("serve.memory=tape", "'tape'", "'host', 'disk'"),
    ("serve.memory=disk", "config.serve.memory_file", "--mode=export-memory"),
    ("serve.device_cache=0.5", "0.5", "0 with serve.memory = 'device'"),
    ("serve.device_cache=1.5", "1.5", "from 0 to 1"),
    ("serve.host_cache=0.1", "0.1", "0 with serve.memory = 'device'"),
    ("serve.off_layers=(0,)", "0", "among (1, -1)"),
    ("serve.off_orders=(4,)", "4", "among model.engram.orders = (2, 3)"),
    ("serve.host=", "''", "not empty"),
    ("serve.port=65536", "65536", "from 0 to 65535"),
    ("serve.port=-1", "-1", "from 0 to 65535"),
    ("serve.api_key=x", "only for --mode=serve"),
    ("serve.cors_origins=example.org", "'example.org'", "'*', or origins such as"),
    ("serve.log_level=loud", "'loud'", "'info', 'warning', 'error'"),
    ("serve.max_body=0", "0", "positive"),
    ("serve.max_answer=0", "0", "positive"),
    ("serve.drain_seconds=-1", "-1", "0 or more"),
    ("model=3", "a section", "d_model"),
    ("model.engram={'layers': (1,)}", "a section", "rows_per_head"),
]


@pytest.mark.parametrize(("override", "words"), [(case[0], case[1:]) for case in IMPOSSIBLE])
def test_impossible_values(override, words):
    key, _, value = override.partition("=")
    line = refused(described({key: value}), *words)
    if "config." not in "".join(words):  # the key that breaks the rule is another one
        assert f"config.{key}" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.engram.d_mem": 48}, ("'block'", "128 columns divide d_model = 16 and d_mem = 48")),
        ({"model.engram.fp8_recipe": "mx"}, ("'mx'", "32 columns")),
        ({"model.dtype": "float64"}, ("'fp8'", "float64")),
    ],
)
def test_impossible_fp8(overrides, words):
    refused(described({"model.engram.precision": "fp8", "model.d_model": 16, **overrides}), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"model.kept": ("logits",)},
            ("'logits'", "different ones of outputs, attention, queries, experts"),
        ),
        (
            {"model.kept": ("queries", "queries")},
            ("'queries'", "different ones of"),
        ),
        (
            {"model.kept": ("experts",), "model.ffn.routed_experts": 0},
            ("without 'experts' in a model without experts",),
        ),
        (
            {"model.kept": ("experts",), "mesh.expert": 2},
            ("without 'experts' where mesh.expert = 2 exchanges tokens",),
        ),
    ],
)
def test_what_cannot_be_kept(overrides, words):
    refused(described({"model.remat": "block", **overrides}), "model.kept", *words)


OVER = {"model.engram.form": "over_encoding", "model.engram.layers": (0,)}
SHUFFLED = {"model.engram.lookup": "shuffled", "data.batch_size": 4, "train.samples": ()}
RAW = {"model.engram.case": True, "model.engram.compression": False}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({**OVER, "model.engram.layers": (1,)}, ("engram.layers = (1,)", "(0,)", "over_encoding")),
        ({**OVER, "serve.off_layers": (-1,)}, ("serve.off_layers = (-1,)", "over_encoding")),
        ({**OVER, "model.engram.gate": "one"}, ("engram.gate = 'one'", "over_encoding")),
        ({**OVER, "model.engram.multi_branch": False}, ("multi_branch = False", "over_encoding")),
        ({**OVER, "model.engram.precision": "bf16"}, ("precision = 'bf16'", "over_encoding")),
        ({**SHUFFLED, "data.batch_size": 3}, ("data.batch_size = 3", "even")),
        ({**SHUFFLED, "data.batch_size": 1}, ("data.batch_size = 1", "even")),
        ({**SHUFFLED, "train.samples": ("a",)}, ("train.samples = ('a',)", "no other sequence")),
        (
            {**SHUFFLED, "data.tasks.names": ("facts",)},
            ("data.tasks.names = ('facts',)", "shuffled"),
        ),
        ({**SHUFFLED, "model.engram.signs": True}, ("engram.signs = True", "shuffled")),
        (
            {
                "model.engram.signs": True,
                "model.engram.heads_per_order": 33,
                "model.engram.d_mem": 66,
            },
            ("heads_per_order = 33", "at most 32"),
        ),
        (RAW, ("engram.case = True", "raw ids")),
        (
            {"model.product_keys.layers": (1,), "optimizer.memory_optimizer": "frozen"},
            ("memory_optimizer = 'frozen'", "product keys"),
        ),
        (
            {"model.engram.case": True, "model.engram.hash_dialect": QWEN, "tokenizer.eos_id": 2},
            ("engram.case = True", "raw ids"),
        ),
        (
            {"model.engram.compression": False, "tokenizer.canonical_vocab_size": 100},
            ("canonical_vocab_size = 100", "vocab_size = 300", "raw ids"),
        ),
    ],
)
def test_variants_that_exclude_each_other(overrides, words):
    refused(described(overrides), *words)


SCONE = {
    "model.engram.form": "scone",
    "model.engram.layers": (0,),
    "model.engram.heads_per_order": 1,
}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.engram.heads_per_order", 2, "1 in form 'scone'"),
        ("model.engram.hash_dialect", "qwen", "'paper' in form 'scone'"),
        ("model.engram.seed", 3, "0 in form 'scone'"),
        ("model.engram.conv_kernel", 3, "4 in form 'scone'"),
        ("model.engram.precision", "bf16", "'model' in form 'scone'"),
        ("model.engram.fp8_recipe", "mx", "'block' in form 'scone'"),
        ("model.engram.rows_per_head", (30, 40), "for all orders together"),
        ("model.engram.init_std", 0.0, "positive in form 'scone'"),
        ("serve.off_orders", (2,), "() in form 'scone'"),
        ("tokenizer.canonical_vocab_size", 200, "0 or tokenizer.vocab_size = 300"),
    ],
)
def test_impossible_frequent_n_grams(key, value, words):
    assert f"config.{key} = {value!r}" in refused(described({**SCONE, key: value}), words)


FACTS = {"data.tasks.names": ("facts",)}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.tasks.names", ("facts", "facts"), "different ones of facts"),
        ("data.tasks.difficulties", ("impossible",), "different ones of easy, medium, hard"),
        ("data.tasks.share", 1.0, "between 0 and 1"),
        ("data.tasks.share", 0.0, "between 0 and 1"),
        ("data.tasks.frequencies", (4, 1), "ascending"),
        ("data.tasks.frequencies", (0, 1), "from 1 up"),
        ("data.tasks.test_items", 0, "positive"),
        ("data.tasks.seed", -1, "in [0, 2**32)"),
    ],
)
def test_impossible_tasks(key, value, words):
    assert f"config.{key} = {value!r}" in refused(described({**FACTS, key: value}), words)


def test_frequencies_are_of_facts():
    asked = {"data.tasks.names": ("copying",), "data.tasks.frequencies": (2,)}
    refused(described(asked), "data.tasks.frequencies = (2,)", "without 'facts'")


# What looks odd and is meant: small sizes, switches at their ends, schedules longer than the run.
POSSIBLE = {
    "data.seq_len": 1,
    "data.batch_size": 1,
    "model.hyper.streams": 1,
    "model.attention.heads": 1,
    "model.ffn.top_k": 4,
    "model.ffn.shared_experts": 0,
    "model.ffn.dense_layers": 0,
    "model.engram.orders": (2,),
    "model.engram.conv_kernel": 0,
    "model.engram.init_std": 0.0,
    "model.engram.rows_per_head": 2,
    "optimizer.clip_norm": math.inf,
    "optimizer.warmup_steps": 10**6,
    "optimizer.memory_lr_multiplier": 0.0,
    "optimizer.decay_at": (),
    "optimizer.decay_factors": (),
    "optimizer.weight_decay": 0.0,
    "train.keep_best": 0,
    "generate.temperature": 0.0,
    "generate.top_p": 1.0,
    "generate.top_k": 300,
}


def test_odd_values_that_are_meant():
    outcome = described(POSSIBLE)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.engram.layers": ()},
        {"model.ffn.routed_experts": 0},
        {"model.ffn.routed_experts": 0, "model.ffn.dense_layers": 2},
        {"model.engram.hash_dialect": QWEN, "tokenizer.eos_id": 2},
        {"model.engram.form": QWEN},
        {"model.engram.form": "v41", "model.engram.addresses": "host"},
        {"model.engram.precision": "fp8", "model.engram.fp8_recipe": "channel"},
        {"model.engram.precision": "bf16", "model.kernels": "pallas"},
        {"model.engram.gate": "one", "model.engram.multi_branch": False},
        {"model.engram.gate": "learned", "model.engram.conv_kernel": 0},
        {"model.engram.precision": "bf16", "model.engram.gate": "one"},
        {"model.engram.signs": True, "model.engram.case": True, "model.engram.lookup": "one_row"},
        SHUFFLED,
        {**OVER, "model.engram.signs": True, "model.engram.case": True},
        {"model.engram.orders": (2, 3, 4), "model.engram.d_mem": 24, "model.engram.layers": (0, 1)},
        {"model.engram.compression": False, "optimizer.memory_optimizer": "frozen"},
        {**SCONE, "model.engram.addresses": "host", "model.engram.table_dtype": "bfloat16"},
        {"model.product_keys.layers": (0, 1), "model.product_keys.expansion": 4},
    ],
)
def test_parts_may_be_missing_and_forms_mixed(overrides):
    outcome = described(overrides)
    assert (outcome.code, outcome.err) == (0, "")


def test_the_table_knows_every_key():
    """A key that is added without a thought about its values fails here."""
    any_value = {"model.tie_embeddings", "model.hyper.transpose", "model.hyper.norm_gain"}
    any_value |= {"model.hyper.scale_init", "model.ffn.normalise_top_k", "train.count_models"}
    any_value |= {"serve.memory_file", "serve.frequency_file"}
    any_value |= {"serve.access_log", "serve.api_key_file", "serve.share_prefixes"}
    any_value |= {"serve.accept_other_memory", "serve.accept_longer", "serve.parse_special"}
    any_value |= {"tokenizer.name", "tokenizer.path", "data.cache_dir", "data.keep_long"}
    any_value |= {"train.hang_exit"}
    refused = {override.partition("=")[0] for override, *_ in IMPOSSIBLE}
    refused |= {each.partition("=")[0] for given, *_ in CASES for each in given.split()}
    keys = set(keys_of(config_lib.Config))
    assert keys <= refused | any_value
    assert any_value <= keys - (refused - {"model.tie_embeddings"})


def keys_of(hint, path=""):
    """Every key that has a value: "model.ffn.top_k"."""
    for key, inner in config_lib.section_types(hint).items():
        if config_lib.section_types(inner):
            yield from keys_of(inner, f"{path}{key}.")
        else:
            yield f"{path}{key}"
