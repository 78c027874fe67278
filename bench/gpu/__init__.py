"""A day with a GPU as a plan: python -m bench.gpu goes through it, goes on where it was stopped, and loses nothing."""
