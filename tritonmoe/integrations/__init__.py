"""Other libraries that models and training loops are written in."""
