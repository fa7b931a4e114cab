"""Runnable studies of training-data attribution with jaxattr."""
