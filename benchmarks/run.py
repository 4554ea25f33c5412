"""Every benchmark, or those named: tables on the screen, everything in one JSON file.

    python -m benchmarks.run [NAME ...] [--json PATH]

Each runs in a process of its own. Exits with 1 if a figure misses the bound beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

BENCHMARKS = (
    "hashing",
    "table_growth",
    "engram_layer",
    "overhead",
    "describe_cost",
    "eight_devices",
)
DEFAULT = harness.ROOT / "benchmarks" / "results" / "cpu.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="PATH", default=DEFAULT)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}")

    together: dict = json.loads(options.json.read_text()) if options.json.exists() else {}
    found = together.get("benchmarks", {})
    for name in options.names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
            subprocess.run(command, check=True, cwd=harness.ROOT)
            own = json.loads(path.read_text())
        # Each keeps the machine's state it was measured in (load, commit, date).
        found[name] = own["benchmarks"][name] | {k: v for k, v in own.items() if k != "benchmarks"}
        print(flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"benchmarks": found}, indent=1) + "\n")
    missed = [
        f"{name}: {figure['name'].strip()} = {figure['value']:.3g} {figure['unit']}"
        for name, result in found.items()
        for figure in result["figures"]
        if figure["met"] is False
    ]
    print("\n".join(["missed:", *missed]) if missed else "every bound is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
