"""Tensor files: lazy reads, streamed writes, and no trust in what an index says."""
