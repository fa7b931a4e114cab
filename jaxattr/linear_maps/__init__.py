"""Linear maps in a loss: per-example projected gradients that never form a weight gradient.

Let a loss use a parameter W only as y = x W, at positions t. For fixed A [in, r] and B [out, r']
replace W by W + A Z B^T. The loss becomes a function of the small Z [r, r'], and

    y = x W + ((x A) Z) B^T            dL/dZ at Z = 0  =  A^T (dL/dW) B

because dL/dZ = sum_t (x_t A)^T (dL/dy_t B) = A^T (sum_t x_t^T dL/dy_t) B, and the sum in brackets
is dL/dW. The right-hand side needs dL/dW [in, out] for each example; the left-hand side only x A
and dL/dy B. That holds whatever L does with y, for several uses of W (the derivatives add up in the
one Z) and for any operation that is linear in W in this way: matrix products, convolutions and the
look-up of rows. It fails as soon as W enters in any other way, so all its uses must be known.

The loss is an ordinary function, and what it does with its parameters is read from its trace: the
program is evaluated once more, equation by equation, with every array that is a rearranged leaf
labelled as such. `find` says which leaves are such matrices, and why the others are not;
`bottleneck` makes the loss a function of Z; `capture` returns x and dL/dy.

    labels.py       names of axes, through transposes and reshapes
    views.py        arrays that are a rearranged leaf
    sums.py         parts, sums and constant multiples of leaves
    chains.py       products of two leaves, which are a matrix together
    counters.py     blocks and layers that a loop cuts out at the place of its step
    derivatives.py  equations with derivatives of their own: which of them round or multiply
    declaring.py    products that the user declares to be linear maps
    products.py     matrix products, convolutions and look-ups: y = x W in all its layouts
    interpreter.py  the walk through the program, into jit, scan, remat and cond
    analysis.py     `find`: from the uses of a leaf to what it is
    rewriting.py    `bottleneck`
    capturing.py    `capture`
"""

from jaxattr.linear_maps.analysis import STOPPED as STOPPED
from jaxattr.linear_maps.analysis import UNUSED as UNUSED
from jaxattr.linear_maps.analysis import LinearMap as LinearMap
from jaxattr.linear_maps.analysis import LinearMaps as LinearMaps
from jaxattr.linear_maps.capturing import Captured as Captured
from jaxattr.linear_maps.capturing import capture as capture
from jaxattr.linear_maps.declaring import linear_map as linear_map
from jaxattr.linear_maps.rewriting import WithBias as WithBias
from jaxattr.linear_maps.rewriting import bottleneck as bottleneck
from jaxattr.linear_maps.rewriting import find as find
from jaxattr.linear_maps.rewriting import matrix as matrix
