"""What bounds a step, and what would help."""
