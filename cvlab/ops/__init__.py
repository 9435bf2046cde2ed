"""Pure functions of tensors: no models by name, no files, no state."""
