"""Two checkpoints of one model: which tensor of one is which of the other, however each is laid out."""
