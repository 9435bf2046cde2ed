"""Pure functions of tensors: no names of models, no files, no state. May import `errors`."""
