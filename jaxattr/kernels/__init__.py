"""Kernels K of score(q, n) = phi(q)^T Diag(w) K phi(n): statistics, then a linear map.

A kernel acts on the TRAINING side, once, and weights multiply the query's raw features (Li et al.
2025, arXiv:2506.05647, Eq. 6); those of queries are changed too where a kernel `MapsQueries`.
Statistics are sums over training examples, accumulated as the features stream by; most are inverted
on the host in float64.
"""

from jaxattr.kernels.base import Damping as Damping
from jaxattr.kernels.base import Identity as Identity
from jaxattr.kernels.base import Iterates as Iterates
from jaxattr.kernels.base import Kernel as Kernel
from jaxattr.kernels.base import MapsQueries as MapsQueries
from jaxattr.kernels.base import Surroundings as Surroundings
from jaxattr.kernels.base import absolute as absolute
from jaxattr.kernels.base import keeps_operator as keeps_operator
from jaxattr.kernels.base import or_relative as or_relative
from jaxattr.kernels.base import relative as relative
from jaxattr.kernels.diagonal import SecondMoment as SecondMoment
from jaxattr.kernels.example_inverses import DataInf as DataInf
from jaxattr.kernels.gram_matrix import Gram as Gram
from jaxattr.kernels.hessian import ConjugateGradient as ConjugateGradient
from jaxattr.kernels.hessian import InverseHessian as InverseHessian
from jaxattr.kernels.segment import Segment as Segment
from jaxattr.kernels.whitening import Whitening as Whitening
