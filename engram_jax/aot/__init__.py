"""Compiles programs for TPU slices, without a TPU, and reads their cost from the compiler."""

PROGRAMS = TRAIN, DECODE, PREFILL = ("train", "decode", "prefill")  # what --mode=compile compiles
