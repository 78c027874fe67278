"""What a run would take: clusters, models, steps, and intervals of what is predicted."""
