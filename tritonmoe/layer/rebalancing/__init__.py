"""Placements that move: where the load of the last steps says so, experts go to other ranks with all that is theirs."""
