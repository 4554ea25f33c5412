"""Experiments: many runs at equal budgets, and the tables, plots and intervals of them."""
