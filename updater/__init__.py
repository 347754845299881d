"""Whose adapter to train, when, on what, and whether the result is good enough to serve."""
