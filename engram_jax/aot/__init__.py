"""Compiles programs for TPU slices, without a TPU, and reads their cost from the compiler."""
