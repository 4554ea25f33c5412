"""What each mode of the program does, the flags that only some of them read, and what Ctrl-C leaves
of one."""

from __future__ import annotations

MODES = {
    "train": "trains the model, or goes on with the run in --workdir",
    "evaluate": "scores a checkpoint on held-out text, on tasks, or with its text beside it",
    "lm-eval": "scores a checkpoint on benchmarks, by lm-evaluation-harness (docs/lm_eval.md)",
    "long-ppl": "LongPPL and perplexity of a checkpoint on long texts (docs/evaluation.md)",
    "report": "checkpoints side by side in the paper's tables (docs/evaluation.md)",
    "analyse": "looks inside a checkpoint: depth, memory, gates (docs/analysis.md)",
    "generate": "continues --prompt",
    "serve": "answers OpenAI's completions over HTTP (docs/serving.md)",
    "explore": "serves a page that shows what the memory does with a text (docs/explore.md)",
    "export-memory": "writes a checkpoint's tables into a file to serve from",
    "count-memory": "counts which rows the training text reads, for a warm cache",
    "describe": "counts parameters and FLOPs; allocates nothing",
    "compile": "compiles a step for a TPU slice that need not be there, and predicts its time",
    "sweep": "runs an experiment of many models (docs/lab.md)",
}
OPENS_A_RUN = (
    *("train", "evaluate", "lm-eval", "long-ppl", "generate", "serve", "explore", "export-memory"),
)
# And stored rows: serve/open_engine.py.
NEEDS_SERVE = ("serve", "explore", "export-memory", "count-memory")
# They look at no device and read no data; a sweep's processes do.
WITHOUT_PROCESSES = ("describe", "compile", "sweep", "report")
# The flags that only some modes read. The others do not ignore them, they refuse them.
MODES_OF_FLAGS = {
    "json": ("describe", "evaluate", "lm-eval", "long-ppl", "report", "compile", "analyse"),
    "base": ("describe",),
    "prompt": ("generate",),
    "topology": ("compile",),
    "program": ("compile",),
    "dump_hlo": ("compile",),
    "unknown": ("compile",),
    "overflow": ("compile",),
    "pairs": ("compile",),
    "profile": ("train",),
    "tasks": ("evaluate", "lm-eval"),
    "limit": ("lm-eval", "long-ppl"),
    "num_fewshot": ("lm-eval",),
    "include_path": ("lm-eval",),
    "ruler_lengths": ("lm-eval",),
    "ruler_data": ("lm-eval",),
    "confirm_run_unsafe_code": ("lm-eval",),
    "step": (*OPENS_A_RUN[1:], "analyse"),
    "accept_changes": OPENS_A_RUN,
    "output": ("export-memory", "count-memory", "analyse", "lm-eval", "report"),
    "runs": ("report",),
    "format": ("export-memory",),
    "tokens": ("count-memory", "explore", "analyse"),
    "what": ("analyse",),
    "text": ("analyse",),
    "text_tokens": ("analyse",),
    "against": ("analyse",),
    "entities": ("analyse",),
    "ngram": ("analyse",),
    "texts": ("evaluate", "long-ppl"),
    "evaluator": ("long-ppl",),
    "context": ("long-ppl",),
    "truncated": ("long-ppl",),
    "stride": ("long-ppl",),
    "points": ("sweep",),
    "seeds": ("sweep",),
    "report_only": ("sweep",),
    "neighbours": ("evaluate",),
    "neighbours_text": ("evaluate",),
    "knn_tokens": ("evaluate",),
    "knn_index": ("evaluate",),
    "rag_chunk": ("evaluate",),
    "rag_passage": ("evaluate",),
}
# What Ctrl-C leaves of a mode, and how to go on. Training and serving handle the signal themselves
# while there is something to save or to answer.
_BEGINS_AGAIN = "the run is as it was, and the same command begins again"
AFTER_INTERRUPT = {
    "train": "the same command goes on from the last checkpoint",
    "evaluate": f"nothing was scored; {_BEGINS_AGAIN}",
    "lm-eval": f"nothing was written; {_BEGINS_AGAIN}",
    "long-ppl": f"nothing was written; {_BEGINS_AGAIN}",
    "report": "nothing was written; the same command begins again",
    "analyse": f"nothing was written; {_BEGINS_AGAIN}",
    "generate": f"nothing is kept; {_BEGINS_AGAIN}",
    "serve": f"no request was being answered; {_BEGINS_AGAIN}",
    "explore": f"nothing was shown; {_BEGINS_AGAIN}",
    "export-memory": f"the file was not written; {_BEGINS_AGAIN}",
    "count-memory": f"the file was not written; {_BEGINS_AGAIN}",
    "describe": "nothing is kept; the same command begins again",
    "compile": "nothing was reported; the same command begins again",
    "sweep": "the runs that are finished are kept, and the same command goes on with the others",
}
