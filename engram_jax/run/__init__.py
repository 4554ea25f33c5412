"""A training run: the command line, resuming, the training loop, and the results at its end."""
