"""Squared per-sample gradients: gathered while blocks are replayed, handed to the writer group by group."""
