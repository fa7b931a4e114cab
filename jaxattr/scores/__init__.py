"""Scores of training examples for queries, and the strongest of them."""
