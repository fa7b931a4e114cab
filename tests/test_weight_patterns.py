"""Ways in which models write their parameters: what the features of each come to."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxattr as ja
from jaxattr.features import bases, projections
from tests.linear_map_checks import normal

RANK = 3


def two_sided(loss, params, batch, materialize=False, **kwargs):
    basis = bases.Signs(materialize=materialize)
    method = ja.tracin(loss, projection=projections.two_sided(RANK, basis=basis))
    example = jax.tree.map(lambda x: x[0], batch)
    return ja.featurizer(method, params, example, **kwargs)


def assert_features_are_exact(loss, params, batch, **kwargs):
    """Features of the rewritten loss are those of gradients that are formed; returns them."""
    fast = two_sided(loss, params, batch, **kwargs)
    slow = two_sided(loss, params, batch, materialize=True, **kwargs)
    assert fast.layout == slow.layout
    got, expected = fast(params, batch), slow(params, batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    return fast


def test_a_scale_that_is_an_einsum_is_one_group():
    def loss(params, x, key):
        del key
        x = x @ params["dense"]["kernel"]
        return jnp.sum(jnp.tanh(jnp.einsum("td,d->td", x, params["norm"]["scale"])) ** 2)

    params = {"dense": {"kernel": normal(0, 6, 5)}, "norm": {"scale": normal(1, 5)}}
    featurize = assert_features_are_exact(loss, params, normal(2, 3, 4, 6))
    assert featurize.layout.names == ("dense", "norm")
    assert featurize.layout.dims == (9, 5)
