"""Covariances of what linear layers read, and of the gradients at what they put out."""
