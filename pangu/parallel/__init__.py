"""Parallelism applied from outside to a model that knows nothing of it; one file per dimension."""
