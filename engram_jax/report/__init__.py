"""report.md and report.html: the pictures and tables at the end of a run."""
