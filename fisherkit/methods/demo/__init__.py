"""``demo``: a small model, trained here, on which the commands are shown."""
