"""What a training step is: state, loss, gradients, optimizers."""
