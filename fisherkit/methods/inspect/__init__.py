"""``inspect``: the contents of a file, summed by layer, module or tensor; and how two files compare."""
