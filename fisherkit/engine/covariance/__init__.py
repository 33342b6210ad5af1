"""Covariances of the inputs of linear layers, and of the gradients at their outputs."""
