"""Compiles programs for a TPU slice without one, and reads their cost from the compiler's output."""
