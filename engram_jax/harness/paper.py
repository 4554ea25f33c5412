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
    their own examples, so many, and are not asked for others. metric: which of lm-eval's the table
    shows, NAME or NAME,FILTER.
    """

    name: str
    shots: int
    tasks: tuple[str, ...]
    own: bool = False
    metric: str = "acc"


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("MMLU", 5, ("mmlu",)),
    Benchmark("MMLU-Pro", 5, ("mmlu_pro",), own=True, metric="exact_match"),
    Benchmark("C-Eval", 5, ("ceval-valid",)),
    Benchmark("CMMLU", 5, ("cmmlu",)),
    Benchmark("AGIEval", 0, ("agieval",)),
    Benchmark("BBH", 3, ("bbh_cot_fewshot",), own=True, metric="exact_match"),
    Benchmark("ARC-Challenge", 25, ("arc_challenge",), metric="acc_norm"),
    Benchmark("HellaSwag", 10, ("hellaswag",), metric="acc_norm"),
    Benchmark("PIQA", 0, ("piqa",)),
    Benchmark("WinoGrande", 5, ("winogrande",)),
    Benchmark("TriviaQA", 5, ("triviaqa",), metric="exact_match"),
    Benchmark("DROP", 1, ("drop",), metric="f1"),
    Benchmark("C3", 0, ()),
    Benchmark("HumanEval", 0, ("humaneval",), own=True, metric="pass@1"),
    Benchmark("MBPP", 3, ("mbpp",), own=True, metric="pass_at_1"),
    Benchmark("CRUXEval", 2, ("cruxeval_input", "cruxeval_output"), own=True, metric="pass@1"),
    Benchmark("GSM8K", 8, ("gsm8k_cot",), own=True, metric="exact_match,strict-match"),
    Benchmark("MATH", 4, ("minerva_math",), own=True, metric="exact_match"),
)


class Ruler(NamedTuple):
    """A column of the paper's table of long contexts: the mean of tasks of lm-eval's `ruler`."""

    name: str
    tasks: tuple[str, ...]


RULER: tuple[Ruler, ...] = (
    Ruler("S", ("niah_single_1", "niah_single_2", "niah_single_3")),
    Ruler("MK", ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3")),
    Ruler("MV", ("niah_multivalue",)),
    Ruler("MQ", ("niah_multiquery",)),
    Ruler("VT", ("ruler_vt",)),
    Ruler("CWE", ("ruler_cwe",)),
    Ruler("FWE", ("ruler_fwe",)),
    Ruler("QA", ("ruler_qa_squad", "ruler_qa_hotpot")),
)
