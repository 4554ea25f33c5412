"""What a compiled program does, read from the compiler's output: no TPU is needed."""
