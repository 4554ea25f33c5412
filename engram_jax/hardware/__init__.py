"""The machines: TPU generations, peak FLOP/s, compiler options, loops compiled for the CPU,
huge pages."""
