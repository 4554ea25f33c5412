"""The repository's address: pyproject.toml has it, and what must repeat it is written from there.

    python -m scripts.repository_address              which address it is, and who repeats it
    python -m scripts.repository_address OWNER/NAME   another one, everywhere

A notebook's links, its install cell and the badges of README must spell the address out, for they
are read where nothing of the repository is. tests/colabs/test_address.py checks that all agree.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "OWNER/engram_jax"
HOST = "https://github.com/"
# Stands where the address does until there is a real one.
SAID_SO = f" The address {PLACEHOLDER} is a placeholder until the repository is published."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")


def address(root: Path = ROOT) -> str:
    """OWNER/NAME, of the key project.urls.Repository of pyproject.toml."""
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]
    return str(urls["Repository"]).removeprefix(HOST)


def files(root: Path = ROOT) -> list[Path]:
    """The files that may name it."""
    pages = [root / "pyproject.toml", root / "README.md", root / "colabs" / "README.md"]
    return [*pages, *sorted((root / "colabs").glob("*.ipynb"))]


def replace(new: str, root: Path = ROOT) -> list[str]:
    """Write another address wherever the present one stands, and leave out that it is a placeholder
    where it is none any more; returns the files changed."""
    old, changed = address(root), []
    whole_name = re.compile(rf"{re.escape(old)}(?![\w-])")
    for file in files(root):
        text = file.read_text(encoding="utf-8")
        found = whole_name.sub(new, text.replace(SAID_SO, "") if new != PLACEHOLDER else text)
        if found != text:
            file.write_text(found, encoding="utf-8")
            changed.append(str(file.relative_to(root)))
    return changed


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or (arguments and not _NAME.fullmatch(arguments[0])):
        sys.exit("usage: python -m scripts.repository_address [OWNER/NAME]")
    if arguments:
        print("\n".join(replace(arguments[0])) or "nothing to change")
        return
    mine = address()
    note = " (a placeholder: the repository is not published yet)" if mine == PLACEHOLDER else ""
    print(f"{mine}{note}")
    for file in files():
        print(f"{file.read_text(encoding='utf-8').count(mine):4}  {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
