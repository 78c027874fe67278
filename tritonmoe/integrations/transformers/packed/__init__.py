"""Experts of transformers' models whose weights are packed: found, read, loaded, made."""
