"""One forward and one backward sweep over the blocks of a model; and the resident engine, which is their oracle."""
