"""A model larger than memory, run block by block (torch)."""
