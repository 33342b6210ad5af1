"""Pure tensor functions: tensors in, tensors out, no files and no state."""
