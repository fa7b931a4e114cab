"""A batch to its features phi [b, p]: gradients, projected, one slice of columns per group."""

from jaxattr.features import projections as projections
