"""Inference: continuous batching, with the memory on the device or off it."""
