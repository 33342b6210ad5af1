"""Pure functions on arrays: arrays in, arrays out, no files and no state."""
