"""Style transfer and texture synthesis."""
