"""What exp, tanh and log of a backend err, measured against the errors that its adapter states."""
