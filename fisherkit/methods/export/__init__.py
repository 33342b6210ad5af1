"""``export``: a mask in the words of other tools."""
