"""Training on a backend: gradients, the optimizer, the losses of a run, and a run that is resumed."""
