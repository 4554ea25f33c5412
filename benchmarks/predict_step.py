"""The time of a compiled TPU step, predicted from the compiler's text: a model, not a measurement.

    python -m benchmarks.predict_step FOLDER/NAME.after_codegen.txt --slice v5p:4x4x8 \\
        --tokens 40960

For texts that are there already, of any TPU program, MaxText's too; `launch.py --mode=compile`
predicts what it compiles. The method: engram_jax/aot/predict.py and prices.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from engram_jax.aot.predict import Assumptions, examine, rounded
from engram_jax.aot.predict_report import as_table, predicted
from engram_jax.config.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.after_codegen.txt")
    parser.add_argument("--slice", required=True, help="what it was compiled for: v5p:4x4x8")
    parser.add_argument("--tokens", type=float, default=0, help="of one device and step")
    parser.add_argument(
        "--unknown", type=float, default=1.5, help="rounds of a loop whose trip count is data"
    )
    parser.add_argument(
        "--overflow", type=float, help="the same where the loop communicates; default: --unknown"
    )
    parser.add_argument(
        "--pairs", type=float, default=0, help="of tokens and experts, per grouped product"
    )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument(
        "--top", type=int, default=0, help="a table, too, with so many of the costliest places"
    )
    flags = parser.parse_args()
    try:
        assumptions = Assumptions(flags.unknown, flags.overflow, flags.pairs)
        step = examine(flags.file.read_text(), flags.slice, assumptions)
    except (OSError, UserError, ValueError) as error:
        parser.error(str(error))
    found = rounded(step.summary(flags.tokens))
    print(json.dumps(found, indent=None if flags.json else 1))
    if flags.top:
        print(as_table(predicted(step, places=flags.top)))


if __name__ == "__main__":
    main()
