"""``inspect``: what is in a file, summed by layer, module or tensor; and how two files compare."""
