"""Generated scenes: textured shapes on textured backgrounds, and how they are rendered."""
