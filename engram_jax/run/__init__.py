"""The life of a run: the command line, the training loop, and what is shown at its end."""
