"""Losses on held-out text, and count models to compare them with."""
