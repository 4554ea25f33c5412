"""What the documentation says about the code is so: keys, files, symbols, links.

docs/log.md is history: an entry names files as they were called when it was written.
"""

from __future__ import annotations

import ast
import functools
import re
import runpy
import shlex
from pathlib import Path

import pytest

import engram_jax
from engram_jax.config import section_types
from scripts import config_reference

ROOT = Path(__file__).resolve().parent.parent
HISTORY = ("docs/log.md", "CHANGELOG.md")
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in (
        *("*.md", "docs/*.md", "colabs/README.md"),
        *("kernels_pallas/*/README.md", "tests/golden/README.md"),
    )
    for page in ROOT.glob(pattern)
)
# Where a page's short names begin; a page's own folder comes first.
ROOTS = ("", "engram_jax", "docs", "kernels_pallas")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
METHOD = re.compile(r"[A-Z]\w+\.[a-z_]\w+")  # `MLA.paged`, without the file
KINDS = (".py", ".md", ".sh", ".toml", ".lock", ".svg", ".cff", ".yml")
MADE = (
    "runs/",
    "report.md",
    "profile/",
    "tensorboard/",
    "checkpoints/",
    "docs/api/",
    "build/",
    ".venv",
)


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def code_of(page: str) -> list[str]:
    """What stands in `backticks`, outside of blocks of commands and output."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def places(page: str, path: str) -> list[Path]:
    """The files and folders that a path on a page can mean."""
    starts = [(ROOT / page).parent, *(ROOT / start for start in ROOTS)]
    return [found for start in starts for found in start.glob(path.rstrip("/"))]


def is_path(code: str) -> bool:
    """Whether it names a file or folder of this repository."""
    if not PATH.fullmatch(code) or code.startswith(MADE):
        return False
    return code.endswith(KINDS) or (code.endswith("/") and code.count("/") > 0)


@functools.cache
def symbols(file: Path) -> frozenset[str]:
    """Names that a module defines, and those of its classes as Class.name."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                walk(node.body if isinstance(node, ast.ClassDef) else [], f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    walk(ast.parse(file.read_text()).body, "")
    return frozenset(found)


@functools.cache
def everything() -> frozenset[str]:
    """The names of all modules."""
    files = [
        f for folder in ("engram_jax", "kernels_pallas") for f in (ROOT / folder).rglob("*.py")
    ]
    return frozenset().union(*(symbols(file) for file in files))


def missing(page: str, codes: list[str]) -> list[str]:
    """What `path` and `path.py: name, Class.name, .name` name and is not there."""
    wrong = []
    for code in codes:
        path, colon, names = code.partition(": ")
        if colon and path.endswith(".py") and is_path(path):
            files = [file for file in places(page, path) if file.is_file()]
            known = set().union(*(symbols(file) for file in files))
            before = ""
            for name in names.split(", "):
                name = f"{before}{name}" if name.startswith(".") else name
                before = name.rpartition(".")[0]
                if name not in known:
                    wrong.append(f"{page}: `{path}` has no {name}")
        elif is_path(code) and not places(page, code):
            wrong.append(f"{page}: `{code}` is not there")
        elif METHOD.fullmatch(code) and code not in everything():
            wrong.append(f"{page}: no class has `{code}`")
    return wrong


def test_the_reference_of_the_configuration_is_current():
    """`python -m scripts.config_reference` writes it; every key has one line of meaning."""
    assert config_reference.PAGE.read_text() == config_reference.render()


def test_a_key_without_a_meaning_fails():
    class Section(config_reference.Config):
        """No line for `name`."""

    with pytest.raises(ValueError, match="name"):
        config_reference.meanings(Section)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_files_and_symbols_exist(page):
    assert missing(page, code_of(page)) == []


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("memory/table.py", True),
        ("memory/store/", True),
        ("tests/golden/*.npz", True),
        ("n / H", True),
        ("memory/tables.py", False),
        ("memory/storage/", False),
        ("memory/table.py: lookup", True),
        ("memory/table.py: look_up", False),
        ("layers/mla.py: MLA.cached, .paged", True),
        ("layers/mla.py: MLA.cached, .pages", False),
        ("MLA.paged", True),
        ("MLA.pages", False),
    ],
)
def test_what_is_wrong_is_found(code, right):
    found = missing("docs/architecture.md", [code])
    assert bool(found) == (not right)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:|#", target):
            path = (ROOT / page).parent / target.partition("#")[0]
            assert path.exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_commands_name_files_and_flags_that_exist(page):
    """`python launch.py --config=configs/X.py --mode=...` and `python -m benchmarks.X`."""
    text = text_of(page)
    for name in re.findall(r"--config=(configs/\w+\.py)", text):
        assert name == "configs/NAME.py" or (ROOT / name).is_file(), name
    for module in re.findall(r"python -m ((?:benchmarks|scripts|engram_jax)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").is_file() or path.is_dir(), module
    keys = re.findall(r"--config\.([a-z_.0-9]+)=", text)
    known = {
        f"{name}.{key}"
        for name, section in config_reference.sections()
        for key in section_types(section)
    }
    assert {f".{key}" if "." not in key else key for key in keys} <= known


def commands(page: str) -> list[list[str]]:
    """The arguments of every `python launch.py` in a page's indented blocks, in order."""
    text = text_of(page).replace("\\\n", " ")
    lines = re.findall(r"^    .*?\bpython launch\.py (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_own_text_commands_can_be_run_one_after_another():
    """In one folder, page after page: no two runs share a workdir, and what a command reads is
    there before it. tests/run/test_documented_commands.py runs them."""
    trained: set[str] = set()
    read = 0
    for page in ("README.md", "docs/tutorial.md", "docs/training.md"):
        for arguments in commands(page):
            given = dict(a.removeprefix("--").partition("=")[::2] for a in arguments)
            if "config.name" in given and "mode" not in given:
                place = given.get("workdir", f"runs/{given['config.name']}")
                assert place not in trained, f"{page}: {place} is another run's already"
                trained.add(place)
            for key in ("workdir", "config.train.init_from"):
                if given.get(key, "").startswith("runs/"):
                    assert given[key].partition("@")[0] in trained, f"{page}: {arguments}"
                    read += 1
    assert trained == {"runs/my_text", "runs/mine", "runs/tuned"} and read >= 9


def test_paths_in_the_code_exist():
    """What comments and docstrings call folder/file.py or page.md."""
    named = re.compile(r"(?<![\w./{-])((?:\w+/)+\w+\.(?:py|md))\b")
    wrong = []
    for folder in ("engram_jax", "kernels_pallas", "benchmarks", "configs", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            page = str(file.relative_to(ROOT))
            wrong += [
                f"{page}: {path}" for path in named.findall(text_of(page)) if not places(page, path)
            ]
    assert wrong == ["engram_jax/data/tfds_text.py: text/c4.py"]  # of tensorflow-datasets


def test_docstrings_become_what_sphinx_parses():
    """Paragraphs, items and drawings; the build of the site (`make docs`) parses all of them."""
    conf = runpy.run_path(str(ROOT / "docs/conf.py"))
    docstring = """\
Sums of `row`s, x_t * m.

name: of the run,
  and of `a | b`.
keep, best: how many.

    plan   no *communication*"""
    assert [line for line in conf["rst"](docstring.splitlines()) if line] == [
        "Sums of ``row``\\ s, x\\_t \\* m.",
        "* name: of the run,",
        "  and of ``a | b``.",
        "* keep, best: how many.",
        "::",
        "        plan   no *communication*",
    ]


def test_the_citation_is_of_this_version():
    citation = text_of("CITATION.cff")
    assert f"\nversion: {engram_jax.__version__}\n" in citation
    assert f"## [Unreleased] {engram_jax.__version__}\n" in text_of("CHANGELOG.md")
    paper = citation.partition("preferred-citation:")[2]
    assert "Conditional Memory via Scalable Lookup" in paper and "2601.07372" in paper
