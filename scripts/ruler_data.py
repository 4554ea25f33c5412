"""Fill a folder with what lm-eval's RULER tasks would download: `--ruler_data=FOLDER`.

    python -m scripts.ruler_data --text=TEXT --output=FOLDER [--essays=DIR] [--squad=FILE]
        [--hotpot=FILE] [--punkt=PLACE] [--words=DIR]

TEXT is what scripts/debian_text made. What is given is copied (--essays: a folder of *.txt, of Paul
Graham's for published numbers; --squad: SQuAD's dev-v2.0.json; --hotpot: HotpotQA's
hotpot_dev_distractor_v1.json; --words: nouns.txt, adjectives.txt, verbs.txt in place of
wonderwords' lists). The rest is made from TEXT: running text for the haystack, and questions about
records of iso-codes and miscfiles in the two files' formats (scripts/ruler_questions.py). NLTK's
punkt_tab is taken from PLACE (a folder or zip file that holds it), else from the Python package
llama-index-core, which carries it and which pip downloads; without either, Punkt's parameters are
trained on the haystack, which needs the extra `eval`. README.md and manifest.json say of each part
what it is; equal input gives equal files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from engram_jax.harness.ruler_build import MANIFEST, digest
from scripts.ruler_questions import hotpot_of, squad_of

SQUAD, HOTPOT = "dev-v2.0.json", "hotpot_dev_distractor_v1.json"
PUNKT = "llama-index-core==0.14.25"
# Running text; the others are lists, tables and reference pages.
PROSE = ("bible-kjv-text", "debian-reference-en", "postgresql-doc-15", "python3.11-doc")
ESSAY_BYTES = 3_000_000  # half a million words: enough for 131,072 tokens several times over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="the folder that scripts/debian_text made")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    for name in ("essays", "squad", "hotpot", "punkt", "words"):
        parser.add_argument(f"--{name}", type=Path, help="copied in place of what is made")
    given = parser.parse_args()
    if given.output.exists():
        sys.exit(f"error: {given.output}: exists; name a new folder")
    if given.text is None and not (given.essays and given.squad and given.hotpot):
        sys.exit("error: --text: missing; only --essays, --squad and --hotpot together do without")
    for path in vars(given).values():
        if path not in (None, given.output) and not path.exists():
            sys.exit(f"error: {path}: no such file or folder")
    given.output.mkdir(parents=True)
    fill(**vars(given))


def fill(
    text: Path | None,
    output: Path,
    essays: Path | None = None,
    squad: Path | None = None,
    hotpot: Path | None = None,
    punkt: Path | None = None,
    words: Path | None = None,
) -> None:
    """Fill an existing folder; see above."""
    parts: dict[str, dict[str, Any]] = {}

    def made(name: str, source: str, original: bool | None) -> None:
        found = digest(output / name)
        parts[name] = {"source": source, "original": original, "sha256": found}
        print(f"{name}: {source}", flush=True)

    for name, folder in (("essays", essays), ("words", words)):
        if folder:
            (output / name).mkdir()
            for file in sorted(folder.glob("*.txt")):
                shutil.copyfile(file, output / name / file.name)
            made(name, "as given", None)
    if not essays:
        assert text is not None
        used = write_essays(text, output / "essays")
        made("essays", f"running text of Debian's {', '.join(used)}, not Paul Graham's", False)
    for name, file, make in ((SQUAD, squad, squad_of), (HOTPOT, hotpot, hotpot_of)):
        if file:
            shutil.copyfile(file, output / name)
            made(name, "as given", None)
        else:
            assert text is not None
            (output / name).write_text(json.dumps(make(text)), encoding="utf-8")
            source = "questions made from records of Debian's iso-codes and miscfiles"
            made(name, f"{source}, not {'SQuAD' if name == SQUAD else 'HotpotQA'}", False)
    made("nltk_data", *write_punkt(punkt, output))
    (output / MANIFEST).write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    lines = [f"* `{name}`: {about['source']}" for name, about in parts.items()]
    (output / "README.md").write_text(
        "# Data of RULER's tasks, for `--mode=lm-eval --ruler_data`\n\n"
        "Made by scripts/ruler_data.py. Scores with parts that are not the original ones cannot be"
        " compared with published ones.\n\n" + "\n".join(lines) + "\n"
    )


def write_essays(text: Path, folder: Path) -> list[str]:
    """Paragraphs of sentences, as equal a share of every package; the packages that are there."""
    folder.mkdir()
    used = [name for name in PROSE if (text / name).is_dir()]
    for package in used:
        files = sorted((text / package).iterdir(), key=_hash_of_name)
        size = 0
        for file in files:
            kept = prose(file.read_text(encoding="utf-8"))
            size += len(kept.encode())
            if size > ESSAY_BYTES // len(used):
                break
            if kept:
                (folder / f"{package}-{file.stem}.txt").write_text(kept, encoding="utf-8")
    if not any(folder.iterdir()):
        sys.exit(f"error: {text}: has no running text; needs some of {', '.join(PROSE)}")
    return used


def _hash_of_name(path: Path) -> bytes:
    return hashlib.sha256(path.name.encode()).digest()


def prose(text: str) -> str:
    """The lines of a text that are sentences, without the numbers of verses."""
    lines = [re.sub(r"^\d+ ", "", line) for line in text.splitlines()]
    kept = [line for line in lines if len(line.split()) >= 8 and re.search(r"[.?!;:]$", line)]
    return "\n".join(line for line in kept if re.match(r"[A-Z]", line)) + "\n" * bool(kept)


def write_punkt(place: Path | None, output: Path) -> tuple[str, bool | None]:
    """English's punkt_tab into the folder; (where it is from, whether it is NLTK's own; None =
    whoever gave it knows)."""
    goal = output / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    goal.mkdir(parents=True)
    if place is not None:
        if not _copy_punkt(place, goal):
            sys.exit(f"error: {place}: holds no punkt_tab/english")
        return "punkt_tab as given", None
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PUNKT]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for wheel in Path(scratch).glob("*.whl") if done.returncode == 0 else ():
            if _copy_punkt(wheel, goal):
                return f"NLTK's punkt_tab, from the Python package {PUNKT}", True
    train_punkt(output / "essays", goal)
    return "Punkt trained on the essays by NLTK's trainer, not NLTK's punkt_tab", False


def _copy_punkt(place: Path, goal: Path) -> bool:
    """Copy the files of a folder or zip file's punkt_tab/english; whether there are any."""
    if place.is_dir():
        found = [f for f in sorted(place.rglob("english/*")) if f.parent.parent.name == "punkt_tab"]
        if place.name == "punkt_tab":
            found = sorted((place / "english").glob("*"))
        for file in found:
            shutil.copyfile(file, goal / file.name)
        return bool(found)
    with zipfile.ZipFile(place) as archive:
        inside = [n for n in archive.namelist() if re.search(r"punkt_tab/english/[^/]+$", n)]
        for name in inside:
            (goal / name.rsplit("/", 1)[1]).write_bytes(archive.read(name))
    return bool(inside)


def train_punkt(essays: Path, goal: Path) -> None:
    """Punkt's parameters of a folder's texts, in punkt_tab's files (Kiss and Strunk 2006)."""
    from nltk.tabdata import TabEncoder
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    for file in sorted(essays.glob("*.txt")):
        trainer.train(file.read_text(encoding="utf-8"), finalize=False)
    trainer.finalize_training()
    params, encoder = trainer.get_params(), TabEncoder()
    lists = {"abbrev_types": params.abbrev_types, "sent_starters": params.sent_starters}
    tables = {
        "collocations.tab": encoder.tups2tab(sorted(params.collocations)),
        "ortho_context.tab": encoder.ivdict2tab(dict(sorted(params.ortho_context.items()))),
    }
    tables |= {f"{name}.txt": encoder.set2txt(sorted(words)) for name, words in lists.items()}
    for name, content in tables.items():
        (goal / name).write_text(content, encoding="utf-8", newline="")


if __name__ == "__main__":
    main()
