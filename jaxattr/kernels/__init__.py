"""Kernels K of score(q, n) = phi(q)^T Diag(w) K phi(n): statistics, then a linear map.

A kernel acts on the TRAINING side, once; weights multiply the query's raw features (Li et al. 2025,
arXiv:2506.05647, Eq. 6). Statistics are sums over training examples, accumulated as the features
stream by; they are inverted on the host in float64.
"""

from jaxattr.kernels.base import Damping as Damping
from jaxattr.kernels.base import Kernel as Kernel
from jaxattr.kernels.base import Surroundings as Surroundings
from jaxattr.kernels.base import absolute as absolute
from jaxattr.kernels.base import identity as identity
from jaxattr.kernels.base import relative as relative
from jaxattr.kernels.diagonal import second_moment as second_moment
from jaxattr.kernels.example_inverses import data_inf as data_inf
from jaxattr.kernels.gram_matrix import gram as gram
from jaxattr.kernels.hessian import conjugate_gradient as conjugate_gradient
from jaxattr.kernels.hessian import inverse_hessian as inverse_hessian
from jaxattr.kernels.whitening import autocorrelation as autocorrelation
