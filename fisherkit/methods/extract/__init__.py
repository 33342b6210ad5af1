"""``extract``: measure the Fisher of a model on a prompt set."""
