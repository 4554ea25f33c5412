"""What a program compiled for a TPU slice costs, by the compiler's own output; no TPU needed."""
