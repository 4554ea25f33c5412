"""`--tasks=paper`: the benchmarks of the paper's table of base models, as tasks of lm-eval.

Shots are the paper's. Where the paper's text that we have does not say, they are those of
DeepSeek-V3's table of base models (arXiv 2412.19437, Table 3). Prompts are lm-eval's own, so a
number is comparable with other numbers of lm-eval, not digit by digit with the paper's.
"""

from __future__ import annotations

from typing import NamedTuple

PAPER = "paper"


class Benchmark(NamedTuple):
    """A line of the table.

    name: the paper's. shots: the paper's. tasks: lm-eval's; () = it has none. own: the tasks bring
    their own examples, so many, and are not asked for others.
    """

    name: str
    shots: int
    tasks: tuple[str, ...]
    own: bool = False


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("MMLU", 5, ("mmlu",)),
    Benchmark("MMLU-Pro", 5, ("mmlu_pro",), own=True),
    Benchmark("C-Eval", 5, ("ceval-valid",)),
    Benchmark("CMMLU", 5, ("cmmlu",)),
    Benchmark("AGIEval", 0, ("agieval",)),
    Benchmark("BBH", 3, ("bbh_cot_fewshot",), own=True),
    Benchmark("ARC-Challenge", 25, ("arc_challenge",)),
    Benchmark("HellaSwag", 10, ("hellaswag",)),
    Benchmark("PIQA", 0, ("piqa",)),
    Benchmark("WinoGrande", 5, ("winogrande",)),
    Benchmark("TriviaQA", 5, ("triviaqa",)),
    Benchmark("DROP", 1, ("drop",)),
    Benchmark("C3", 0, ()),
    Benchmark("HumanEval", 0, ("humaneval",), own=True),
    Benchmark("MBPP", 3, ("mbpp",), own=True),
    Benchmark("CRUXEval", 2, ("cruxeval_input", "cruxeval_output"), own=True),
    Benchmark("GSM8K", 8, ("gsm8k_cot",), own=True),
    Benchmark("MATH", 4, ("minerva_math",), own=True),
)
