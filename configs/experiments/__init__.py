"""Sweeps, and the paper's own budgets; docs/lab.md says how they are declared, run and read."""
