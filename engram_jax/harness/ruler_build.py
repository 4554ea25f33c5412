"""RULER's prompts by lm-eval's own code, a process for each task and length (harness/ruler.py).

    python -P ruler_build.py SETTINGS

Some of that code tries for ever where no prompt is as short as it is asked to be, and catches
whatever is raised meanwhile; so each build is a fork with a limit on its processor time. Forks of
one process have its imports (lm-eval pairs 6 million words), and the same random state: a task's
prompts are the same whatever else is built. SETTINGS is a JSON file:

tokenizer: a tokenizers' JSON. special: whether special tokens spelled in a text are their ids.
data: a folder with what lm-eval would download, or null. samples: of a task and length at most, or
null = lm-eval's. jobs: [[module, function, length, seconds], ...]. output: the folder of results.

For each job a line of JSON on standard output: {"file": of the documents, a JSON list} or {"error":
a line}. It imports nothing of this project: it starts without JAX.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "lm_eval.tasks.ruler"
MANIFEST = "manifest.json"  # of the folder: what its parts are (scripts/ruler_data.py)
FILL = "`python -m scripts.ruler_data` fills the folder"
# What makes a task's documents, and how many, by module.
_MAKERS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}
SAMPLES = 500  # lm-eval's


def digest(path: Path) -> str:
    """SHA-256, hexadecimal, of a file, or of the names and contents of a folder's files."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            content = file.read_bytes()
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


class Tokens:
    """What lm-eval's code uses of a tokenizer of transformers."""

    def __init__(self, file: str, special: bool) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(file)
        self._tokenizer.encode_special_tokens = not special

    def __call__(self, text: str) -> types.SimpleNamespace:
        """`.input_ids`, the ids of a text; nothing is added."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return types.SimpleNamespace(input_ids=found.ids)


def common_utils() -> Any:
    """lm-eval's module. It takes one name of transformers, which need not be there for it."""
    name = "transformers"
    importlib.import_module("lm_eval.tasks")  # some of it asks whether transformers is there
    stand_in = types.ModuleType(name)
    stand_in.AutoTokenizer = None  # type: ignore[attr-defined]
    before = sys.modules.get(name)
    sys.modules[name] = before or stand_in
    try:
        return importlib.import_module(f"{PACKAGE}.common_utils")
    finally:
        if before is None:
            del sys.modules[name]


def prepare(settings: dict[str, Any]) -> None:
    """Give lm-eval's modules the tokenizer."""
    ours = Tokens(settings["tokenizer"], settings["special"])
    common_utils().AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *a, **k: ours)


def _localise(name: str, folder: Path) -> None:
    """Put the folder's files where a module of lm-eval's looks, before it is imported."""
    if name == "niah_utils":
        import datasets
        import nltk

        nltk.data.path.insert(0, str(folder / "nltk_data"))
        nltk.download = lambda *a, **k: False
        datasets.load_dataset = lambda *a, **k: {"text": _essays(folder)}
    if name in ("niah_utils", "cwe_utils") and (folder / "words").is_dir():
        import wonderwords

        lists = {
            name: (folder / "words" / f"{name}.txt").read_text(encoding="utf-8").split("\n")
            for name in ("nouns", "adjectives", "verbs")
        }
        lists = {name: [word for word in words if word] for name, words in lists.items()}
        lists |= {name.removesuffix("s"): words for name, words in lists.items()}
        wonderwords.RandomWord = functools.partial(wonderwords.RandomWord, **lists)


def _essays(folder: Path) -> list[str]:
    if not (files := sorted((folder / "essays").glob("*.txt"))):
        raise FileNotFoundError(f"{folder / 'essays'}: no *.txt; {FILL}")
    import nltk

    try:  # the essays are cut into sentences
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        place = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
        raise FileNotFoundError(f"{place}: no such folder; {FILL}") from None
    return [file.read_text(encoding="utf-8") for file in files]


def module_of(name: str, data: str | None, samples: int | None) -> Any:
    """A module of lm-eval's, with the folder's files and at most `samples` documents."""
    if data is not None:
        _localise(name, Path(data))
    module: Any = importlib.import_module(f"{PACKAGE}.{name}")
    maker = getattr(module, _MAKERS[name])

    @functools.wraps(maker)
    def fewer(*given: Any, **named: Any) -> Any:
        most = named.get("num_samples", SAMPLES)
        most = most if samples is None else min(most, samples)
        if "qas" in named:
            most = min(most, len(named["qas"]))
        return maker(*given, **(named | {"num_samples": most}))

    setattr(module, _MAKERS[name], fewer)
    if name == "qa_utils" and data is not None:
        module.download_json = functools.partial(_local_json, Path(data))
    return module


def _local_json(folder: Path, url: str) -> Any:
    file = folder / url.rsplit("/", 1)[-1]
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {FILL}")
    return json.loads(file.read_text(encoding="utf-8"))


def build(make: Callable[..., Any], length: int, seconds: int, file: Path) -> str:
    """Write the documents of a length, a JSON list; the error in a line, "" = none."""
    wrong = file.with_suffix(".error")
    gc.freeze()  # a collection would copy all that is shared
    pid = os.fork()
    if pid == 0:
        try:
            _alone(make, length, seconds, file)
            os._exit(0)
        except BaseException as error:
            lines = [line.strip(" *") for line in str(error).splitlines()]
            told = next((line for line in lines if line), type(error).__name__)
            wrong.write_text(told, encoding="utf-8")
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return (
                f"lm-eval found no prompt of {length:,} tokens in {seconds} seconds of processor"
                " time; the smallest does not fit"
            )
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    if os.WEXITSTATUS(status):
        return wrong.read_text(encoding="utf-8") if wrong.is_file() else "ended without a reason"
    return ""


def _alone(make: Callable[..., Any], length: int, seconds: int, file: Path) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what tries for ever may print for ever
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    import numpy as np

    random.seed(0)  # lm-eval's seed of Python's
    np.random.seed(1234)  # noqa: NPY002 - and of NumPy's: its code draws from both
    documents = list(make(max_seq_lengths=[length], tokenizer="ours")["test"])
    file.write_text(json.dumps(documents), encoding="utf-8")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # lm-eval prints
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads and forks do not go together
    prepare(settings)
    modules: dict[str, Any] = {}
    for number, (name, function, length, seconds) in enumerate(settings["jobs"]):
        file = Path(settings["output"], f"{number}.json")
        try:
            if name not in modules:
                modules[name] = module_of(name, settings["data"], settings["samples"])
            error = build(getattr(modules[name], function), length, seconds, file)
        except Exception as reason:  # a package that is missing, a name that lm-eval has no more
            error = f"{type(reason).__name__}: {reason}".splitlines()[0]
        print(json.dumps({"error": error} if error else {"file": str(file)}), file=out, flush=True)


if __name__ == "__main__":
    main()
