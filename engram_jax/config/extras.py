"""Optional packages, which pyproject.toml installs as extras, and the error where one is missing.

Training imports none of them. A part that needs one checks here before it imports its modules, so
that the error is one line, before anything is read or written.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from engram_jax.config.errors import UserError

PACKAGES: dict[str, tuple[str, ...]] = {
    "serve": ("numba", "llvmlite", "starlette", "uvicorn", "h11"),
    "report": ("matplotlib",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "eval": ("lm_eval", "datasets", "evaluate", "nltk", "scipy", "wonderwords"),
    "lab": ("bm25s", "datasketch", "faiss", "matplotlib", "pyarrow", "scipy"),
}


def require(extra: str, what: str) -> None:
    """Raise UserError, naming `what`, unless every package of an extra is installed."""
    if missing := _missing(extra):
        raise _error(missing[0], extra, what)


def lacks(extra: str) -> str:
    """Half a line for the user, "PACKAGE is not installed (COMMAND)"; "" if nothing is missing."""
    return "".join(_line(package, extra) for package in _missing(extra)[:1])


def _missing(extra: str) -> list[str]:
    return [package for package in PACKAGES[extra] if not installed(package)]


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it, which may take a second."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _line(package: str, extra: str) -> str:
    return f"{package} is not installed ({command(extra)})"


def command(extra: str) -> str:
    """The command that installs an extra, in a checkout or where only the package is installed."""
    checkout = (Path(__file__).parents[2] / "pyproject.toml").is_file()
    return f'pip install -e ".[{extra}]"' if checkout else f'pip install "engram_jax[{extra}]"'


def _error(package: str, extra: str, what: str) -> UserError:
    return UserError(f"{what}: needs the extra {extra!r}; {_line(package, extra)}")
