"""Settings that no machine can hold, that mean nothing, or that a tokenizer cannot serve: one line.

A line of a table: what is set, and what the line says.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from configs import engram27b
from engram_jax import config as config_lib
from engram_jax.addressing import load_tokenizer
from engram_jax.addressing.tokenizer import check_encodes, unknown_id
from engram_jax.config.errors import UserError
from engram_jax.config.given_files import local_path
from engram_jax.data.token_store import TokenStore, write_store
from engram_jax.data.train_bpe import find_eos
from engram_jax.hardware import memory, platforms
from engram_jax.model.memory_needs import check_serving, check_training
from tests.runs import TINY, configuration, launched, refused, small_config


def said(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 700, line
    return line


# ---- one key -------------------------------------------------------------------------------------

LONG = 99999999999999999999
KEYS: list[tuple[str, Any, str]] = [
    ("train.steps", LONG, "below 2**31"),
    ("train.steps", 2**31, "below 2**31"),
    ("train.log_every", 2**31, "below 2**31"),
    ("train.eval_every", LONG, "below 2**31"),
    ("train.eval_batches", LONG, "below 2**31"),
    ("train.checkpoint_every", LONG, "below 2**31"),
    ("train.keep", LONG, "below 2**31"),
    ("train.sample_tokens", 2**31, "below 2**31"),
    ("train.seen_tokens", 2**62, "below 2**62"),
    ("tokenizer.vocab_size", 10_000_000_000, "below 2**31"),
    ("tokenizer.canonical_vocab_size", 2**31, "below 2**31"),
    ("tokenizer.eos_id", 2**31, "below 2**31"),
    ("data.seq_len", 2**31, "below 2**31"),
    ("data.batch_size", LONG, "below 2**31"),
    ("data.workers", 1025, "at most 1024"),
    ("data.max_document_bytes", 2**62, "below 2**62"),
    ("data.max_megabytes", LONG, "below 2**62"),
    ("data.path", "a\0b", "without a NUL character"),
    ("data.cache_dir", "a\0b", "without a NUL character"),
    ("model.d_model", 2**31, "below 2**31"),
    ("model.layers", 10_001, "at most 10000"),
    ("model.hyper.sinkhorn_iterations", 100_000, "at most 1000"),
    ("model.hyper.streams", 1025, "at most 1024"),
    ("model.engram.conv_kernel", 1025, "at most 1024"),
    ("model.engram.rows_per_head", (2**31,), "below 2**31"),
    ("model.engram.seed", 2**62, "below 2**62"),
    ("optimizer.muon_ns_steps", 101, "at most 100"),
    ("optimizer.warmup_steps", 2**31, "below 2**31"),
    ("mesh.data", 2**31, "below 2**31"),
    ("mesh.fsdp", LONG, "below 2**31"),
    ("serve.pages", 2**31, "below 2**31"),
    ("serve.capacity", 2**31, "below 2**31"),
    ("serve.prefill_chunk", 2**31, "below 2**31"),
    ("serve.queue", 2**31, "below 2**31"),
    ("serve.sequences", LONG, "below 2**31"),
    ("serve.page", 2**31, "below 2**31"),
    ("serve.max_body", 2**62, "below 2**62"),
    ("generate.max_tokens", 2**31, "below 2**31"),
    ("generate.top_k", 2**31, "below 2**31"),
]


@pytest.mark.parametrize(("key", "value", "words"), KEYS)
def test_a_key(key, value, words):
    values = config_lib.default_config_dict()
    values.update_from_flattened_dict({key: value})
    line = said(lambda: config_lib.parse_config(values))
    assert line.startswith(f"config.{key} = ") and words in line


def test_shared_experts_without_routed_ones():
    values = config_lib.default_config_dict()
    values.model.ffn.shared_experts = 2
    line = said(lambda: config_lib.parse_config(values))
    assert line.startswith("config.model.ffn.shared_experts = 2: must be 0 without routed experts")
    values.model.ffn.top_k = 3  # a model with experts whose number is set to 0 is dense
    config_lib.parse_config(values)


# ---- what takes memory ---------------------------------------------------------------------------

GB = 1e9
TRAINING: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer__vocab_size": 2**31 - 1}, "config.tokenizer.vocab_size = 2147483647"),
    ({"model__ffn__dense_dim": 2**30}, "config.model (--mode=describe tells the parts)"),
    ({"model__engram__rows_per_head": (2**27,)}, "config.model.engram.rows_per_head ="),
    ({"data__seq_len": 2**26}, "config.data.seq_len = 67108864"),
    ({"data__workers": 400}, "config.data.workers = 400: takes at least 44.0 GB; this machine"),
]


@pytest.mark.parametrize(("changes", "words"), TRAINING)
def test_training_takes_more_than_there_is(changes, words):
    dense = {"model__engram__layers": ()} if "data__seq_len" in changes else {}
    config = small_config(Path("/none"), **changes, **dense)
    line = said(lambda: check_training(config, 24 * GB, 24 * GB))
    assert line.startswith(words) and "24.0 GB" in line
    check_training(config, 1e6 * GB, 1e6 * GB)


KEPT = [  # numbers of a token of Engram-27B: 30 layers, 29 of them with experts; 32 heads
    ("outputs", 30 * 2 * 2560),
    ("attention", 30 * 32 * 128),
    ("queries", 30 * 32 * (128 + 64)),
    ("experts", 29 * 2 * 6 * 1536),
]


@pytest.mark.parametrize(("name", "numbers"), KEPT)
def test_what_is_kept_takes_memory(name, numbers):
    """By what a device must have more, in bfloat16 of the 1,280 sequences of 4,096 tokens."""

    def least(kept):
        values = engram27b.get_config()
        values.model.kept = kept
        line = said(lambda: check_training(config_lib.parse_config(values), GB, GB))
        return float(line.partition(" GB with what is beside it")[0].split()[-1].replace(",", ""))

    assert least((name,)) - least(()) == pytest.approx(1280 * 4096 * numbers * 2 / GB, abs=0.2)


SERVING: list[tuple[dict[str, int], str]] = [
    ({"pages": 2**31 - 1}, "config.serve.pages = 2147483647"),
    ({"capacity": 2**31 - 1}, "config.serve.capacity = 2147483647"),
    ({"prefill_chunk": 2**31 - 1}, "config.serve.prefill_chunk = 2147483647"),
    ({"prefill_sequences": 2**24, "sequences": 2**24}, "config.serve."),
    ({"sequences": 2**24}, "config.serve.sequences = 16777216"),
    ({"queue": 2**31 - 1}, "config.serve.queue = 2147483647"),
    ({"page": 2**31 - 1}, "config.serve.page = 2147483647"),
]


@pytest.mark.parametrize(("changes", "words"), SERVING)
def test_serving_takes_more_than_there_is(changes, words):
    config = configuration("engram_tiny")
    serve = dataclasses.replace(config.serve, **changes)
    config = dataclasses.replace(config, serve=serve)
    capacity = serve.capacity or config.data.seq_len
    line = said(lambda: check_serving(config, capacity, 24 * GB, 24 * GB))
    assert line.startswith(words) and "24.0 GB" in line
    check_serving(config, capacity, 1e9 * GB, 1e9 * GB)


@pytest.mark.parametrize("name", ["engram_tiny", "moe_tiny"])
def test_what_fits_is_not_refused(name):
    config = configuration(name)
    check_training(config, 2 * GB, 2 * GB)
    check_serving(config, config.data.seq_len, 2 * GB, 2 * GB)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "self").write_text("0::/a/b\n")
    for place, limit in {"": "max", "a": "5000", "a/b": "7000"}.items():
        (tmp_path / "fs" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / place / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "self")
    monkeypatch.setattr(memory, "_CONTROL", tmp_path / "fs")
    assert memory.machine_bytes() == 5000
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "gone")
    assert memory.machine_bytes() > 5000


# ---- tokenizers ----------------------------------------------------------------------------------


def words_of(vocabulary: dict[str, int], unknown: str = "<unk>") -> Tokenizer:
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


TOKENIZERS = {
    "without its unknown token": (words_of({"a": 0}), "cannot encode every text (WordLevel error"),
    "an empty vocabulary": (words_of({}), "its vocabulary is empty"),
    "Unigram without its unknown token": (Tokenizer(models.Unigram([("a", 0.0)])), "cannot encode"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_fail_on_a_text(case, tmp_path):
    tokenizer, words = TOKENIZERS[case]
    tokenizer.save(str(tmp_path / "t.json"))
    line = said(lambda: check_encodes(load_tokenizer(tmp_path / "t.json"), tmp_path / "t.json"))
    assert words in line and str(tmp_path) in line


def test_an_end_of_document_that_is_none():
    known = words_of({"<unk>": 0, "a": 1, "b": 2})
    for eos_id, words in (
        (3, "eos_id = 3: the tokenizer x has 3 ids; must be below 3"),
        (-1, "no"),
    ):
        given = config_lib.TokenizerConfig(name="x", eos_id=eos_id)
        assert words in said(lambda given=given: find_eos(known, given))
    assert find_eos(known, config_lib.TokenizerConfig(eos_id=2)) == 2


def test_a_tokenizer_that_knows_little_of_the_text(tmp_path):
    known = words_of({"<unk>": 0, "a": 1, "end": 2})
    assert unknown_id(known) == 0 and unknown_id(Tokenizer(models.BPE())) is None
    line = said(lambda: write_store(tmp_path, ["a b c d e f"], known, 2, 3))
    assert "71% of the tokens are its unknown token" in line
    write_store(tmp_path, ["a a a b"], known, 2, 3)
    assert TokenStore(tmp_path).unknown_tokens == 1


# ---- stores of tokens ----------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> Path:
    folder = tmp_path / "key" / "train"
    folder.mkdir(parents=True)
    write_store(folder, ["a b a", "b b"], words_of({"<unk>": 0, "a": 1, "b": 2, "end": 3}), 3, 4)
    TokenStore(folder).verify()
    return folder


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


STORES = {
    "a flipped bit": (lambda f: flipped(f / "tokens.bin", 4), "tokens.bin: damaged, its CRC-32"),
    "a flipped start": (lambda f: flipped(f / "starts.npy", -16), "starts.npy: damaged"),
    "tokens missing": (lambda f: (f / "tokens.bin").write_bytes(b""), "0 bytes instead of 14"),
    "starts empty": (lambda f: (f / "starts.npy").write_bytes(b""), "no .npy file of numbers"),
    "starts of objects": (
        lambda f: (f / "starts.npy").write_bytes(b"\x93NUMPY\1\0v\0{'descr': '|O'"),
        "no .npy file",
    ),
    "no starts": (lambda f: (f / "starts.npy").unlink(), "starts.npy: No such file"),
    "store.json of {": (lambda f: (f / "store.json").write_text("{"), "is no JSON, line 1"),
    "store.json of {}": (lambda f: (f / "store.json").write_text("{}"), "does not describe"),
    "another dtype": (
        lambda f: (f / "store.json").write_text('{"dtype": "O", "eos_id": 1, "text_bytes": 1}'),
        "does not describe a token store",
    ),
    "no store.json": (lambda f: (f / "store.json").unlink(), "store.json: No such file"),
}


@pytest.mark.parametrize("case", STORES)
def test_damaged_token_stores(case, store):
    damage, words = STORES[case]
    damage(store)
    line = said(lambda: TokenStore(store).verify())
    assert words in line and line.endswith(f"; delete {store.parent} and run again")


def test_stores_of_earlier_versions_are_read(store):
    meta = json.loads((store / "store.json").read_text())
    for later in ("tokens.bin", "starts.npy", "unknown_tokens"):
        del meta[later]
    (store / "store.json").write_text(json.dumps(meta))
    TokenStore(store).verify()
    assert TokenStore(store).unknown_tokens == 0 and len(TokenStore(store)) == 7


# ---- command lines -------------------------------------------------------------------------------

COMMANDS = [
    (["--mode=train", "--step=3"], "--step: only for"),
    (["--step=best"], "--step: only for"),
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run: must be a path of this machine"),
    (["--workdir=s3://bucket"], "--workdir=s3://bucket: must be a path of this machine"),
    (["--workdir=file:///tmp/x"], "must be a path of this machine"),
    (["--workdir=~nobody-of-that-name/x"], "--workdir=~nobody-of-that-name/x: "),
    (
        ["--mode=compile", "--topology=v5p:2x2x1", "--dump_hlo=gs://b/x"],
        "--dump_hlo=gs://b/x: must",
    ),
    (["--config.train.steps=99999999999999999999"], "config.train.steps = 99999999999999999999"),
    (["--config.tokenizer.vocab_size=10000000000"], "config.tokenizer.vocab_size = 10000000000"),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS)
def test_command_lines(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(launched(TINY, *arguments), words)
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert local_path("--workdir", "~/x") == Path("/home/of/mine/x")
    for plain in ("runs/a:b", "c:d", "/x/gs:/y", "a/~"):
        assert local_path("--workdir", plain) == Path(plain)


ENDS = {
    "sys.exit(3)": "ends the program (sys.exit(3))",
    "sys.exit()": "ends the program (sys.exit(None))",
    "raise SystemExit('why')": "ends the program (sys.exit('why'))",
}


@pytest.mark.parametrize("statement", ENDS)
def test_configurations_that_end_the_program(statement, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"import sys\n{statement}\n")
    refused(launched(f"--config={path}", "--mode=describe"), str(path), ENDS[statement])


PLATFORMS = [
    (False, [], (), ""),  # no libtpu: nothing to leave out
    (True, [], (), "cpu"),
    (True, ["xla_cuda12"], ("/dev/nvidiactl",), "cuda,cpu"),
    (True, ["xla_cuda12"], (), "cpu"),
    (True, ["xla_cuda12", "xla_cuda13"], ("/dev/nvidiactl",), "cuda,cpu"),
    (True, ["xla_rocm7"], ("/dev/kfd",), "rocm,cpu"),
    (True, ["metal"], (), ""),
]


@pytest.mark.parametrize(("libtpu", "plugins", "there", "wanted"), PLATFORMS)
def test_no_tpu_is_looked_for_where_there_is_none(libtpu, plugins, there, wanted, monkeypatch):
    class Plugin:
        def __init__(self, name: str):
            self.name = name

    monkeypatch.setattr(platforms, "has_tpu_chips", lambda: False)
    find = {"libtpu": object() if libtpu else None}
    monkeypatch.setattr(platforms.importlib.util, "find_spec", find.get)
    named = [Plugin(name) for name in plugins]
    monkeypatch.setattr(platforms.importlib.metadata, "entry_points", lambda group: named)
    monkeypatch.setattr(platforms.os.path, "exists", there.__contains__)
    assert platforms.without_tpu() == wanted
