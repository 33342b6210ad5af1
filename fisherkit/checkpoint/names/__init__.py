"""Tensor names: where in a model a tensor stands, which spellings mean the same tensor, what its axes are."""
