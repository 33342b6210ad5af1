"""``fapm`` and ``merge``: which part of a finished fine-tune to keep."""
