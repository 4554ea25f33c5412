"""lm-evaluation-harness on the inference engine (the extra `eval`)."""
