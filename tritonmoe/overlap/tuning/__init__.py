"""How num_chunks="auto" chooses: measure, search, try."""
