"""``score``: losses of checkpoints on prompt sets, each streamed once, and what changed against the first."""
