"""Does it help? Fine-tunes that forget, protections against it, and the controls beside them; see ``__main__``."""
