"""Unrolled influence: the derivative of what a model does, through the steps that trained it.

runs.py      a training run as steps that take a weight per example
segments.py  training as a few stretches of gradient descent on a quadratic
backward.py  back through the steps, from states that are kept and states that are made anew
"""
