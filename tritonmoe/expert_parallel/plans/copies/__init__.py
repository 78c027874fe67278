"""Copies of hot experts for one call: which, where, at what price, how they travel and what they compute."""
