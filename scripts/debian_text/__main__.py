"""Make folders of English text and of structured facts from packages of Debian's main archive.

    python -m scripts.debian_text --output=TEXT [--lab=LAB] [--packages=DEBS]

Needs Debian's (or a derivative's) apt-get, dpkg-deb and man, no root, and the network for `apt-get
download`; packages that are in DEBS already are not asked for again. TEXT gets a folder of
documents per package, a few kilobytes each; LAB a balanced selection of those that Debian does not
update within a release, beside Python's standard library. TEXT.manifest.json and LAB.manifest.json
say what is in them: packages and versions, documents, bytes, and the SHA-256 of names and contents
in the order of names. Equal packages and an equal `man` give equal folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from engram_jax.data.folder_text import in_hash_order
from engram_jax.data.local_text import list_library
from scripts.debian_text import readers
from scripts.debian_text.plain_text import parts

_PYTHON_INDEXES = r"/html/(genindex|py-modindex|search|contents|download|whatsnew/changelog)"
PACKAGES: dict[str, Any] = {  # a reader each
    "dict-gcide": readers.dictionary,
    "dict-wn": readers.dictionary,
    "dict-foldoc": readers.dictionary,
    "iso-codes": readers.iso_codes,
    "miscfiles": readers.miscfiles,
    "perl-doc": readers.man_pages,
    "manpages": readers.man_pages,
    "manpages-dev": readers.man_pages,
    "python3.11-doc": partial(readers.html_pages, skip=_PYTHON_INDEXES),
    "git-doc": readers.asciidoc,
    "sqlite3-doc": readers.html_pages,
    "postgresql-doc-15": partial(readers.html_pages, skip="/html/bookindex"),
    "debian-reference-en": partial(readers.html_pages, skip="/index"),
    "fortunes": readers.fortunes,
    "bible-kjv-text": readers.bible,
}
# Only unpacked: its program reads bible-kjv-text.
PROGRAMS = ("bible-kjv",)

# Debian updates these within a release. The lab's text must be the same next month, so it has none.
UPDATED = ("perl-doc", "python3.11-doc", "git-doc", "sqlite3-doc", "postgresql-doc-15")

TEXT_BYTES = 24_000_000  # of the lab's natural text
CODE_BYTES = 8_000_000  # of its code
CODE_PART = 16_000  # bytes: longer files are cut between definitions
SMALLEST = 100  # bytes: what is shorter is no document (a page that is a picture)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--output", type=Path, required=True, help="the folder to make")
    arguments.add_argument(
        "--lab", type=Path, help="a second folder: a balanced selection and code"
    )
    arguments.add_argument("--packages", type=Path, help="where .deb files are, or are put")
    given = arguments.parse_args()
    folders = [folder for folder in (given.output, given.lab) if folder]
    for folder in folders:
        if folder.exists():
            sys.exit(f"error: {folder}: exists; name a new folder")
    for command in ("apt-get", "dpkg-deb", "man"):
        if not shutil.which(command):
            sys.exit(f"error: {command}: not found; this needs Debian, or a system like it")
    with tempfile.TemporaryDirectory() as scratch:
        packages = given.packages or Path(scratch, "packages")
        packages.mkdir(parents=True, exist_ok=True)
        files = download(packages)
        unpacked = Path(scratch, "unpacked")
        unpacked.mkdir()
        for name, file in files.items():
            subprocess.run(["dpkg-deb", "-x", str(file), str(unpacked / name)], check=True)
        write_text(unpacked, given.output)
    versions = {name: _field(file, "Version") for name, file in files.items()}
    write_manifest(given.output, {name: versions[name] for name in PACKAGES})
    if given.lab:
        select(given.output, given.lab, TEXT_BYTES, [p for p in PACKAGES if p not in UPDATED])
        write_code(given.lab / "python", CODE_BYTES)
        own = {name: versions[name] for name in PACKAGES if (given.lab / name).is_dir()}
        write_manifest(given.lab, own | {"python": platform.python_version()})


def download(folder: Path) -> dict[str, Path]:
    """The packages' files in `folder`, by package; what is missing is downloaded."""
    names = [*PACKAGES, *PROGRAMS]
    if missing := [name for name in names if not _files_of(name, folder)]:
        done = subprocess.run(["apt-get", "download", *missing], cwd=folder)
        if done.returncode:
            sys.exit(f"error: apt-get download {' '.join(missing)}: failed, see above")
    return {name: _files_of(name, folder)[-1] for name in names}


def _files_of(name: str, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{name}_*.deb"))


def _field(package: Path, field: str) -> str:
    command = ["dpkg-deb", "--field", str(package), field]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_text(unpacked: Path, output: Path) -> None:
    """Every package's documents, in a folder of its name below `output`."""
    program = unpacked / PROGRAMS[0] / "usr/bin/bible"
    for package, reader in PACKAGES.items():
        folder = output / package
        folder.mkdir(parents=True)
        if reader is readers.bible:
            documents = readers.bible(unpacked / package, program)
        else:
            documents = reader(unpacked / package)
        for name, text in documents:
            if len(text.encode()) >= SMALLEST:
                with open(folder / name, "x", encoding="utf-8") as file:  # no name twice
                    file.write(text)
        print(f"{package}: {len(list(folder.iterdir())):,} documents", flush=True)


def select(text: Path, output: Path, limit: int, packages: Iterable[str]) -> None:
    """Copy at most `limit` bytes, as equal a share of every package as its size allows: documents
    in the order of a hash of their names."""
    sizes = {name: sum(f.stat().st_size for f in (text / name).iterdir()) for name in packages}
    shares = equal_shares(sizes, limit)
    for package in sorted(shares):
        (output / package).mkdir(parents=True)
        used = 0
        for file in sorted((text / package).iterdir(), key=_hash_of_name):
            used += file.stat().st_size
            if used > shares[package]:
                break
            shutil.copyfile(file, output / package / file.name)


def _hash_of_name(path: Path) -> bytes:
    return hashlib.sha256(path.name.encode()).digest()


def equal_shares(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Bytes per package, `limit` in all: all of the small ones, equal shares of the others."""
    shares: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        left = limit - sum(shares.values())
        shares[name] = min(sizes[name], left // (len(sizes) - len(shares)))
    return shares


def write_code(folder: Path, limit: int) -> None:
    """At most `limit` bytes of the source files of this Python's standard library, in the order of
    a hash of their names."""
    folder.mkdir(parents=True)
    used = 0
    for file in in_hash_order(list_library(Path(sysconfig.get_path("stdlib")))):
        try:
            text = file.path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if used + len(text.encode()) > limit:
            break
        used += len(text.encode())
        pieces = list(parts(text, CODE_PART, between="\n\n\n"))
        stem = file.name.removesuffix(".py").replace("/", "-")
        for number, piece in enumerate(pieces, 1):
            name = f"{stem}-{number:04}.py" if len(pieces) > 1 else f"{stem}.py"
            if len(piece.encode()) >= SMALLEST:
                with open(folder / name, "x", encoding="utf-8", newline="") as out:
                    out.write(piece)


def write_manifest(folder: Path, versions: dict[str, str]) -> None:
    """`folder`.manifest.json, and the same as a table."""
    contents: dict[str, dict[str, Any]] = {}
    for name, version in versions.items():
        sizes = [path.stat().st_size for path in (folder / name).iterdir()]
        contents[name] = {"version": version, "documents": len(sizes), "bytes": sum(sizes)}
        contents[name]["sha256"] = digest(folder / name)
        print(f"{name:22}{version:24}{len(sizes):>8,} documents{sum(sizes):>14,} bytes")
    record = {
        "documents": sum(c["documents"] for c in contents.values()),
        "bytes": sum(c["bytes"] for c in contents.values()),
        "sha256": digest(folder),
        "contents": contents,
    }
    print(
        f"{folder}: {record['documents']:,} documents, {record['bytes']:,} bytes, "
        f"SHA-256 {record['sha256']}"
    )
    folder.with_name(folder.name + ".manifest.json").write_text(json.dumps(record, indent=1) + "\n")


def digest(folder: Path) -> str:
    """The SHA-256, in hexadecimal, over all files in the order of their names below `folder`: of
    each its name, a NUL, its size in decimal, a NUL, and its bytes."""
    total = hashlib.sha256()
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    for name in sorted(files):
        content = files[name].read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


if __name__ == "__main__":
    main()
