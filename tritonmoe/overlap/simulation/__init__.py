"""What a schedule would cost in time and memory, without running it."""
