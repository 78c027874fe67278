"""Upcycling: dense feed-forward blocks of a checkpoint become experts."""
