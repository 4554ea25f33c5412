"""Inference: continuous batching, the memory on the device or off it, and an HTTP server."""
