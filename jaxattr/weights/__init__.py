"""Weights per parameter group: their losses, how they are learned, what is reported."""
