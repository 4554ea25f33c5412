"""Pallas kernels, one folder per operation, importing nothing but jax.

    engram_gate   projection of the rows to keys and value, gate, product   (Engram, equations 3, 4)
    short_conv    RMSNorm, depthwise causal convolution, SiLU, residual      (Engram, equation 5)
    mhc           coefficients and mixing of the residual streams            (mHC)

In each folder: README.md (the algorithm, its lower bound and the distance to it), `api.py` (what a
model calls), `reference.py` (plain jax.numpy: the definition, which runs where no kernel does),
`tpu.py` and `gpu.py` (the kernels), `vjp.py` (their gradients), `shapes.py` (the argument shapes
that tests and benchmarks share), `bench.py` (lower bounds and variants), `tuned.json` (block sizes
per device).

On several devices kernels run inside `jax.shard_map(..., check_vma=False)`, on each device's
shards: XLA cannot partition them. Outside of it "auto" takes the reference.

Beside them: `dispatch.py` chooses the implementation, `tuning.py` reads block sizes, `traffic.py`
counts the bytes that a kernel moves.
"""
