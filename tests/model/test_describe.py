"""--mode=describe: figures against formulas written out here, and against the published ones."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys

import pytest

from configs import engram_tiny
from engram_jax import config as config_lib
from engram_jax.addressing import build_addressing
from engram_jax.training.state import abstract_state, build_training
from tests.runs import CONFIGS, ROOT, configuration, launched

GB = 1 << 30


@functools.cache
def described(name: str, *arguments: str) -> dict:
    file = ROOT / "configs" / f"{name}.py"
    outcome = launched(f"--config={file}", "--mode=describe", "--json", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def primes_from(base: int, count: int, taken: set[int]) -> list[int]:
    """The next `count` primes >= base that are not taken, by trial division."""
    found = []
    while len(found) < count:
        if base not in taken and all(base % i for i in range(2, math.isqrt(base) + 1)):
            found.append(base)
            taken.add(base)
        base += 1
    return found


def head_sizes(engram) -> dict[str, list[int]]:
    """Layer by layer, order by order, head by head: no prime serves twice."""
    taken: set[int] = set()
    return {
        str(layer): [
            prime
            for base in engram.base_rows
            for prime in primes_from(base, engram.heads_per_order, taken)
        ]
        for layer in engram.layers
    }


def expected_parts(config) -> dict[str, int]:
    """Parameters of each part, from the equations alone."""
    model, ffn, engram = config.model, config.model.ffn, config.model.engram
    d, layers, n = model.d_model, model.layers, model.hyper.streams
    a = model.attention
    query = d * a.heads * (a.nope_dim + a.rope_dim)
    down = d * (a.kv_lora_rank + a.rope_dim) + a.kv_lora_rank  # and the latent's norm
    up = a.kv_lora_rank * a.heads * (a.nope_dim + a.v_dim)
    output = a.heads * a.v_dim * d
    coefficients = 2 * n + n * n  # pre, post, res
    hyper = (n * d + 1) * coefficients + 3 + (n * d if model.hyper.norm_gain else 0)
    dense = layers if not ffn.routed_experts else ffn.dense_layers
    moe = layers - dense
    expert = 3 * d * ffn.expert_dim
    parts = {
        "token embedding": config.tokenizer.vocab_size * d,
        "attention (MLA)": layers * (query + down + up + output),
        "hyper-connections": 2 * layers * hyper,
        "norms": 2 * layers * d + d,
        "dense feed-forward": dense * 3 * d * ffn.dense_dim,
        "routed experts": moe * ffn.routed_experts * expert,
        "shared experts": moe * ffn.shared_experts * expert,
        "routers": moe * d * ffn.routed_experts,
    }
    if engram.layers:
        parts["engram projections, gates, conv"] = len(engram.layers) * module_size(engram, n, d)
        parts["engram tables"] = table_numbers(engram)
        parts["engram case vectors"] = len(engram.layers) * 10 * engram.d_mem * engram.case
    keys = config.model.product_keys
    if keys.layers:
        learned = d * keys.heads * keys.key_dim + keys.heads * keys.key_dim  # queries, their gains
        learned += keys.heads * keys.sub_keys * keys.key_dim + keys.expansion * keys.dim * d
        parts["product keys, queries, maps"] = len(keys.layers) * learned
        values = keys.sub_keys**2 // keys.expansion * keys.dim
        parts["product-key values"] = len(keys.layers) * values
    return {part: count for part, count in parts.items() if count}


def module_size(engram, n: int, d: int) -> int:
    """Of one Engram layer, without its table and the vectors of case."""
    if engram.form in ("over_encoding", "scone"):  # one matrix, of all orders or of the row
        return engram.d_mem * d
    branches = n if engram.multi_branch else 1
    keys = branches if engram.gate == "context" else 0
    module = engram.d_mem * (keys + 1) * d  # keys of the branches, value
    module += 2 * keys * d  # gains of query and key norm
    module += branches if engram.gate == "learned" else 0
    module += (keys + 1) * d if engram.form == "paper" else 0  # biases
    if engram.form != "v41" and engram.conv_kernel:
        module += (1 + engram.conv_kernel) * branches * d  # norm, taps
    return module


def table_numbers(engram) -> int:
    """Numbers in all tables: f-grams have one head, and a row for what has none of them."""
    if engram.form == "scone":
        return (engram.rows_per_head[0] + 1) * engram.d_mem
    if engram.lookup == "one_row":
        return len(engram.layers) * engram.d_mem
    return sum(map(sum, head_sizes(engram).values())) * engram.dim


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_follow_from_the_equations(name):
    config, found = configuration(name), described(name)
    parts, ffn = expected_parts(config), config.model.ffn
    assert found["parts"] == parts
    assert found["total_params"] == sum(parts.values())
    embedding, tables = parts["token embedding"], parts.get("engram tables", 0)
    experts = parts.get("routed experts", 0)
    idle = experts * (ffn.routed_experts - ffn.top_k) // max(1, ffn.routed_experts)
    active = sum(parts.values()) - embedding - tables - idle
    assert found["token_embedding_params"] == embedding
    assert found["engram_params"] == tables
    assert found["active_params"] == active
    assert found["rho"] == (pytest.approx(idle / (idle + tables)) if idle + tables else None)
    # Per token: two operations a weight, tied head included; scores and mixture over (T + 1) / 2
    # positions on average; the backward pass costs twice the forward.
    a, length = config.model.attention, config.data.seq_len
    attended = a.heads * (a.nope_dim + a.rope_dim + a.v_dim) * (length + 1) / 2
    forward = 2 * (active + embedding) + 2 * config.model.layers * attended
    assert found["flops_per_token"] == pytest.approx(3 * forward, rel=1e-12)
    engram = config.model.engram
    assert {k: v["head_sizes"] for k, v in found["engram"].items()} == head_sizes(engram)
    for memory in found["engram"].values():
        assert memory["rows"] == memory["stored_rows"] == sum(memory["head_sizes"])
        assert memory["dim"] == engram.d_mem // (len(engram.orders) * engram.heads_per_order)


@pytest.mark.parametrize(
    ("name", "total", "active", "engram", "rho"),
    [
        ("dense4b", "4.13", "3.80", "0.00", None),
        ("moe27b", "26.72", "3.81", "0.00", 1.0),
        ("engram27b", "26.73", "3.84", "5.79", 0.743),
        ("engram40b", "39.47", "3.84", "18.53", 0.475),
    ],
)
def test_the_papers_table(name, total, active, engram, rho):
    """The paper's Table 1; billions. rho of Engram-40B is not printed there."""
    found = described(name)
    billions = [found[f"{part}_params"] / 1e9 for part in ("total", "active", "engram")]
    assert [f"{b:.2f}" for b in billions] == [total, active, engram]
    assert (found["rho"] and round(found["rho"], 3)) == rho


def test_the_released_memory(golden):
    """DeepSeek-V4.1-Flash: rows of the released checkpoint, primes and multipliers of its code."""
    published = golden("addressing_v41")
    memories = described("deepseek_v41_memory")["engram"]
    assert {k: m["rows"] for k, m in memories.items()} == {"1": 384_006_168, "14": 384_016_682}
    for layer, memory in memories.items():
        assert memory["head_sizes"] == published[f"primes_{layer}"].ravel().tolist()
        assert memory["multipliers"] == published[f"multipliers_{layer}"].tolist()
        assert memory["dim"] == 256


@pytest.mark.parametrize("name", ["engram27b", "engram40b"])
def test_layer_ids_count_from_zero(name, golden):
    """The multipliers of a layer depend on its id: layer 1's are the demo's layer 1's (the paper's
    layer 2), which hashes the same vocabulary."""
    memories = described(name)["engram"]
    assert list(memories) == ["1", "14"]
    assert memories["1"]["multipliers"] == golden("addressing_demo")["multipliers_1"].tolist()


def test_multipliers_wait_for_a_tokenizer_that_is_yet_to_be_trained(deepseek_tokenizer):
    memories = described("engram_tiny")["engram"]
    assert all(memory["multipliers"] is None for memory in memories.values())
    given = described(
        "engram_tiny",
        f"--config.tokenizer.path={deepseek_tokenizer('0.2.0')}",
        "--config.tokenizer.vocab_size=129280",
    )
    assert given["canonical_vocab_size"] == 98_627
    for layer, memory in given["engram"].items():
        assert len(memory["multipliers"]) == 3
        assert memory["head_sizes"] == memories[layer]["head_sizes"]


def test_what_is_stored_is_counted():
    """Dialect "qwen" rounds a table up to a multiple of 128 rows; training stores them all."""
    qwen = {"model.engram.hash_dialect": "qwen", "tokenizer.eos_id": 2}
    arguments = [f"--config.{key}={value}" for key, value in qwen.items()]
    found = described("engram_tiny", *arguments)
    memories = found["engram"].values()
    for memory in memories:
        assert memory["rows"] == sum(memory["head_sizes"])
        assert memory["stored_rows"] == math.ceil(memory["rows"] / 128) * 128 > memory["rows"]
    counted = sum(memory["stored_rows"] * memory["dim"] for memory in memories)
    assert found["engram_params"] == found["parts"]["engram tables"] == counted
    values = engram_tiny.get_config()
    values.update_from_flattened_dict(qwen)
    config = config_lib.parse_config(values)
    stored = abstract_state(build_training(config, build_addressing(config))).memory
    assert counted == sum(table.rows.size for table in stored.values())
    text = launched(f"--config={ROOT}/configs/engram_tiny.py", "--mode=describe", *arguments).out
    assert all(f"({memory['stored_rows']:,} rows stored)" in text for memory in memories)


D, D_MEM, M, HEADS, TAPS = 128, 128, 4, 8, 4  # of engram_tiny, which has two such layers
PROJECTED, CONVOLVED = D_MEM * D + D, D + TAPS * D  # a key or the value, and the conv of a branch
MODULE = (M + 1) * PROJECTED + 2 * M * D + M * CONVOLVED


@pytest.mark.parametrize(
    ("switches", "module", "tables"),
    [
        ({}, MODULE, None),
        ({"gate": "one"}, PROJECTED + M * CONVOLVED, None),
        ({"gate": "learned"}, PROJECTED + M + M * CONVOLVED, None),
        ({"multi_branch": False}, 2 * PROJECTED + 2 * D + CONVOLVED, None),
        ({"conv_kernel": 0}, (M + 1) * PROJECTED + 2 * M * D, None),
        ({"lookup": "one_row"}, MODULE, HEADS),
        ({"lookup": "one_row", "hash_dialect": "qwen"}, MODULE, HEADS),
        ({"signs": True, "compression": False}, MODULE, None),
    ],
)
def test_variants_have_the_parameters_and_flops_that_their_table_says(switches, module, tables):
    """docs/models.md. Against the default: the module's own weights, its rows, and 6 FLOPs for each
    weight; nothing else changes."""
    flags = [f"--config.model.engram.{key}={value}" for key, value in switches.items()]
    default = described("engram_tiny")
    found = described("engram_tiny", *flags, "--config.tokenizer.eos_id=2")
    part = "engram projections, gates, conv"
    assert default["parts"][part] == 2 * MODULE and found["parts"][part] == 2 * module
    same = set(default["parts"]) - {part, "engram tables"}
    assert {k: found["parts"][k] for k in same} == {k: default["parts"][k] for k in same}
    assert found["active_params"] - default["active_params"] == 2 * (module - MODULE)
    flops = found["flops_per_token"] - default["flops_per_token"]
    assert flops == pytest.approx(6 * 2 * (module - MODULE), abs=1)
    rows = [memory["rows"] for memory in found["engram"].values()]
    if tables is None:
        assert rows == [memory["rows"] for memory in default["engram"].values()]
    else:
        assert rows == [tables] * 2 == [m["stored_rows"] for m in found["engram"].values()]
        assert found["engram_params"] == 2 * tables * D_MEM // HEADS


def test_what_is_looked_up_costs_no_flops():
    """The vectors of case: 10 of d_mem numbers for each layer, of which a token reads one."""
    default, found = (
        described("engram_tiny"),
        described("engram_tiny", "--config.model.engram.case"),
    )
    assert found["parts"]["engram case vectors"] == 2 * 10 * D_MEM
    assert found["total_params"] - default["total_params"] == 2 * 10 * D_MEM
    for key in ("active_params", "flops_per_token", "engram_params"):
        assert found[key] == default[key]


def test_over_encoding_has_a_matrix_for_each_order():
    switches = ("--config.model.engram.form=over_encoding", "--config.model.engram.layers=(0,)")
    found = described("engram_tiny", *switches)
    assert found["parts"]["engram projections, gates, conv"] == D_MEM * D
    assert [m["rows"] for m in found["engram"].values()] == [
        described("engram_tiny")["engram"]["1"]["rows"]
    ]


def test_the_table_shows_every_part():
    outcome = launched(f"--config={ROOT}/configs/engram27b.py", "--mode=describe")
    assert (outcome.code, outcome.err) == (0, "")
    found = described("engram27b")
    for part, count in found["parts"].items():
        assert any(
            line.startswith(part) and f"{count:,}" in line for line in outcome.out.split("\n")
        )
    for figure in ("26,726,299,860", "3,840,206,420", "74.3%", "36,199,972 rows x 80"):
        assert figure in outcome.out


KEYS = {
    "total_params",
    "active_params",
    "engram_params",
    "token_embedding_params",
    "rho",
    "flops_per_token",
    "engram",
}


# Linux counts the memory of whoever forks a process as that process's own peak; a process as small
# as this one between the tests and the program keeps theirs out of it.
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = usage.ru_utime + usage.ru_stime
print(json.dumps([done.returncode, done.stdout, done.stderr, usage.ru_maxrss, seconds]))
"""


@pytest.mark.parametrize("name", ["engram27b", "deepseek_v41_memory"])
def test_a_process_prints_one_object_and_allocates_no_model(name):
    """197 billion parameters in less than a gigabyte and twenty seconds of a processor."""
    program = [sys.executable, "launch.py", f"--config=configs/{name}.py"]
    command = [sys.executable, "-c", MEASURED, *program, "--mode=describe", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code, out, err, peak, seconds = json.loads(done.stdout)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) >= KEYS
    for memory in found["engram"].values():
        assert {"rows", "head_sizes", "multipliers", "dim"} <= set(memory)
    assert peak * (1 if sys.platform == "darwin" else 1024) < GB
    assert seconds < 20
