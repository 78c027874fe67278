"""Ranks that are threads of one process: their world, exchanges, links, faults."""
