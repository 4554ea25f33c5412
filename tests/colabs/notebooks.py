"""The notebooks of colabs/, and how a test runs one: as Colab does, from its install cell on.

A kernel runs in a throw-away environment that finds the packages of the tests' own one and no
index: pip installs the package there and nothing else, and the tests' environment stays as it is.
What is cloned is a snapshot of the working tree, committed or not.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sysconfig
import time
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.runs import ROOT

FOLDER = ROOT / "colabs"
FILES = sorted(FOLDER.glob("*.ipynb"))
NAMES = [file.stem for file in FILES]
PARAMETERS = "parameters"  # papermill's tag: the cell of settings
INSTALL = "install"  # the id of the install cell
_KERNEL = "colab"


class _Client(NotebookClient):
    """Of a kernel whose specification lies in the folder `kernels`."""

    kernels: Path

    def create_kernel_manager(self) -> AsyncKernelManager:
        specifications = KernelSpecManager(
            kernel_dirs=[str(self.kernels)], ensure_native_kernel=False
        )
        self.km = AsyncKernelManager(
            kernel_name=self.kernel_name, kernel_spec_manager=specifications
        )
        return self.km


@dataclass(frozen=True)
class Environment:
    """kernels: the folder of the kernel's specification. variables: of its process."""

    kernels: Path
    variables: Mapping[str, str]


@dataclass(frozen=True)
class Ran:
    """A notebook after its last cell. found: the values that were asked for. checkout: its clone.
    seconds, processor_seconds: what it took, its child processes included."""

    notebook: Any
    found: dict[str, Any]
    checkout: Path
    seconds: float
    processor_seconds: float

    def shown(self, cell_id: str) -> str:
        """What a cell printed and showed as text."""
        (cell,) = [cell for cell in self.notebook.cells if cell.id == cell_id]
        return "".join(
            output.text if output.output_type == "stream" else "\n".join(_texts(output.data)) + "\n"
            for output in cell.outputs
        )

    def slowest(self, most: int = 4) -> str:
        """The cells that took longest, with their seconds."""
        times = {cell.id: _seconds(cell.metadata.execution) for cell in code_cells(self.notebook)}
        ordered = sorted(times, key=lambda name: -times[name])
        return ", ".join(f"{name} {times[name]:.0f}" for name in ordered[:most])

    def pictures(self) -> int:
        """How many there are."""
        outputs = [output for cell in self.notebook.cells for output in cell.get("outputs", ())]
        return sum("image/png" in output.get("data", {}) for output in outputs)


def _seconds(execution: Mapping[str, str]) -> float:
    """From a cell's beginning to its reply."""
    ends = (execution["iopub.execute_input"], execution["shell.execute_reply"])
    began, ended = (datetime.fromisoformat(end) for end in ends)
    return (ended - began).total_seconds()


def _texts(data: Mapping[str, str]) -> list[str]:
    return [text for kind, text in data.items() if kind in ("text/markdown", "text/plain")]


def read(name: str) -> Any:
    """A notebook of colabs/."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings_cell(notebook: Any) -> Any:
    """The one that is tagged "parameters"."""
    (cell,) = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ())]
    return cell


def snapshot(folder: Path) -> Path:
    """The working tree as a repository of one commit."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "gc.auto=0")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "the working tree")):
        subprocess.run(["git", *who, *command], cwd=folder, check=True)
    return folder


def make_environment(folder: Path, source: Path, variables: Mapping[str, str]) -> Environment:
    """An empty environment of this interpreter that sees the packages of the tests' one.

    source: the repository that the install cells clone.
    """
    venv.create(folder / "venv", symlinks=True)
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    own, shared = sysconfig.get_path("purelib", vars=paths), sysconfig.get_path("purelib")
    Path(own, "shared.pth").write_text(f"{shared}\n")
    python = str(folder / "venv" / "bin" / "python")
    kernel = folder / "kernels" / _KERNEL
    kernel.mkdir(parents=True)
    command = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": _KERNEL, "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    pip = {
        "PIP_NO_INDEX": "1",  # whatever pip would fetch is an error
        "PIP_NO_BUILD_ISOLATION": "0",  # the same for what builds the package: 0 is "none"
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    own_variables = {"ENGRAM_JAX_SOURCE": source.as_uri(), "MPLBACKEND": ""}
    return Environment(folder / "kernels", {**os.environ, **pip, **own_variables, **variables})


def run(
    name: str,
    folder: Path,
    environment: Environment,
    settings: Mapping[str, Any] | None = None,
    wanted: Mapping[str, str] | None = None,
    timeout: int = 1200,
) -> Ran:
    """Run every cell of a notebook in an empty folder, top to bottom; an error of one is raised.

    settings: values in place of the settings cell's, names that it has. wanted: name -> Python
      expression of what is to be found at the end, a value that JSON knows. timeout: of a cell, s.
    """
    notebook = read(name)
    cell = settings_cell(notebook)
    known: dict[str, Any] = {}
    exec(cell.source, known)
    if unknown := [key for key in settings or {} if key not in known]:
        raise KeyError(f"{name}: the settings cell has no {unknown}")
    if settings:
        chosen = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
        notebook.cells.insert(notebook.cells.index(cell) + 1, nbformat.v4.new_code_cell(chosen))
    results = folder / "found.json"
    pairs = "".join(f"{key!r}: {text}, " for key, text in (wanted or {}).items())
    last = f"import json\nopen({str(results)!r}, 'w').write(json.dumps({{{pairs}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    place = {"metadata": {"path": str(folder)}}
    client = _Client(notebook, timeout=timeout, resources=place, kernel_name=_KERNEL)
    client.kernels = environment.kernels
    began, before = time.monotonic(), _processor_seconds()
    try:
        client.execute(env=dict(environment.variables))
    finally:
        nbformat.write(notebook, folder / f"{name}.ipynb")  # to look at
    seconds = time.monotonic() - began
    return Ran(
        notebook=notebook,
        found=json.loads(results.read_text()),
        checkout=folder / "engram_jax",
        seconds=seconds,
        processor_seconds=_processor_seconds() - before,
    )


def _processor_seconds() -> float:
    """Of the processes that this one has started and that have ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
