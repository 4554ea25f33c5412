"""How `make docs` builds the site: the pages of the repository, and every public docstring.

The sources are those of the repository's root, so that links between README, this folder and the
kernels' pages lead somewhere on the site, as they do where the files are read.
The docstrings are read without importing anything (autoapi). They are written for people who read
the source, as plain text: `rst` below turns that into what Sphinx parses, so that none of them
needs a markup of its own. Every warning is an error: a broken link, a missing page, a wrong anchor.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "engram_jax"
author = "the engram_jax maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "autoapi.extension"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/api/**",
    "kernels_pallas/*/README.md",
    "colabs/README.md",
    "tests/golden/README.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "*.egg-info"]
highlight_language = "text"
smartquotes = False  # "latest" and --mode are code
html_theme = "furo"
html_extra_path = ["_root"]  # index.html leads to the root document
html_title = "engram_jax"
html_show_copyright = False
html_show_sourcelink = False
nitpicky = True  # a role that names what does not exist is a warning, too

# Annotations are text, not links: most of them name types of JAX, Flax and NumPy.
nitpick_ignore_regex = [(r"py:(class|obj|data|exc)", ".*")]

myst_heading_anchors = 4
myst_links_external_new_tab = False

autoapi_dirs = [str(ROOT / "engram_jax"), str(ROOT / "kernels_pallas")]
autoapi_root = "docs/api"
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_add_toctree_entry = False
autoapi_member_order = "bysource"
autoapi_python_class_content = "class"
autoapi_keep_files = False
suppress_warnings = [
    "ref.python",  # an annotation such as `Shape` that names several classes
    "autoapi.python_import_resolution",  # constants that are assigned several at a time
]

_ITEM = re.compile(r"(?:[*-]|\d+\.) +|(?=[a-z_*][\w.*]*(?:, [\w.*]+)*(?: \([^)]*\))?: )")
_CODE = re.compile(r"(``.+?``|`.+?`)", re.DOTALL)


def rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText.

    Text in `backticks` is code. A block whose lines are all indented is shown as it is. In the
    others, `name: text` and `* text` begin an item, and the indented lines below continue it.
    """
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line.rstrip())
        elif blocks[-1]:
            blocks.append([])
    out: list[str] = []
    for block in blocks:
        out += [*_block(block), ""]
    return out


def _block(block: list[str]) -> list[str]:
    indented = [line.startswith(" ") for line in block]
    starts = [bool(_ITEM.match(line)) for line in block]
    if not any(indented) and not any(starts[:1]):
        return _inline(block)
    if block[0].endswith(":") and not indented[0] and all(indented[1:]):  # Args:, Returns:
        return [*_inline(block[:1]), "", *_block(textwrap.dedent("\n".join(block[1:])).split("\n"))]
    first = next((n for n, start in enumerate(starts) if start), None)
    if first is None or any(indented[:first]):
        return ["::", "", *(f"    {line}" for line in block)]
    out = [*_inline(block[:first]), ""]
    item: list[str] = []
    for line, start in zip(block[first:], starts[first:], strict=True):
        if start and item:
            out += _bullet(item)
            item = []
        item.append(line.strip())
    return [*out, *_bullet(item)]


def _bullet(item: list[str]) -> list[str]:
    opening = _ITEM.match(item[0])
    head, *rest = _inline([item[0][opening.end() if opening else 0 :], *item[1:]])
    return [f"* {head}", *(f"  {line}" for line in rest)]


def _inline(lines: list[str]) -> list[str]:
    """Code in double backticks; characters that mean something to Sphinx stand for themselves."""
    parts = _CODE.split("\n".join(lines))
    parts[::2] = [re.sub(r"([\\*|_`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{' '.join(part.strip('`').split())}``" for part in parts[1::2]]
    for n, part in enumerate(parts[:-1]):  # `label`s: Sphinx wants code to stand apart
        if n % 2 and parts[n + 1][:1].isalnum():
            parts[n] = f"{part}\\ "
    return "".join(parts).split("\n")


def _docstring(app, what, name, obj, options, lines) -> None:
    lines[:] = rst(lines)


def _once(app, what, name, obj, skip, options) -> bool | None:
    """What a package passes on is shown where it is defined, once."""
    return True if obj.imported else None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autoapi-skip-member", _once)
