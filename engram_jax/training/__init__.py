"""The training step: state, loss, gradients, optimizers."""
