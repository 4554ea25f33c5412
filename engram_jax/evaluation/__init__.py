"""Losses on held-out text, and the count models they are read against."""
