"""``mask``: which weights a fine-tune may change, or which directions it must leave alone."""
