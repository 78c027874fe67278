"""What a run was like, for people: terminal, PNG, Perfetto trace, one-file HTML."""
