"""Prompt sets: from a file of rows to token ids, with a mark on the tokens whose loss counts."""
