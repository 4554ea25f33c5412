"""Inference: continuous batching, with the tables on the device, in host memory or in a file."""
