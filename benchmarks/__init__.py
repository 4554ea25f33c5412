"""What the project claims about speed and memory, measured: see benchmarks/run.py."""
