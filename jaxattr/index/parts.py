"""Features and scores of the parts of queries, such as tokens, of which the outputs add up."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.batches import each_example, leading_size, shapes_of_one
from jaxattr.features.expectations import refuse_unit_norm
from jaxattr.features.featurizer import FeatureRule
from jaxattr.features.plans import Plan
from jaxattr.features.whole_gradients import as_function_of, coordinates
from jaxattr.identity import Program
from jaxattr.index.index import Index
from jaxattr.index.queries import (
    QueryArrays,
    QueryFeatures,
    QueryFunctions,
    accepted_by,
    features_of_batch,
    featurizer_of,
    state_of,
)
from jaxattr.inputs.data import as_batch
from jaxattr.kernels import Kernel, MapsQueries
from jaxattr.keys import example_keys
from jaxattr.scales import exponent_of, scaled, wide
from jaxattr.sources import track
from jaxattr.typing import Batch, Example, Features, Key, OutputFn, Params


def part_features(index: Index, queries: Any, split: Callable[[Example], Batch]) -> QueryFeatures:
    """Features of the parts of each query, such as its tokens, to be scored like queries.

    Args:
      index: the index that they will be scored against.
      queries: a pytree of arrays [q, ...].
      split: one query -> a pytree of arrays [t, ...], t parts whose outputs add up to the query's.

    Returns:
      Features [q * t, c * p], the parts of the first query first; those of a query add up to its
      own features. Where the method scales queries to unit norm, the parts of a query are scaled
      together. Queries that are not finite are marked in all of their parts.

    Raises:
      ValueError: if the index was opened without its method and checkpoints, or parts do not add
        up: squared scores, unit norm per draw.
    """
    queries = as_batch(queries, "queries", accepted_by(index))
    one = shapes_of_one(jax.tree.map(jnp.asarray, queries))
    featurize, method = featurizer_of(index, one)
    _refuse(index, featurize.rule.output)
    state, q = state_of(index), leading_size(queries)
    cut = Program(split, (one,))
    step = _part_step(featurize.unscaled(), featurize.rule.normalize, method.kernel, cut)
    found, finite = [], []
    for number in track(iter(range(q)), "queries by parts", q):
        one = jax.tree.map(lambda x, number=number: jnp.asarray(x[number]), queries)
        features, whole = step(state, one, jnp.asarray(-1 - number))
        found.append(features)
        finite.append(np.full(len(features), bool(whole)))
    lost = np.flatnonzero(~np.concatenate(finite))
    return QueryFeatures(jnp.concatenate(found), lost, index.query_side)


def check_sum(index: Index, query: Example, split: Callable[[Example], Batch]) -> None:
    """Raises if what the parts of a query give does not add up to what the query gives.

    Args:
      index: the index.
      query: ONE query.
      split: as in `part_features`.

    Raises:
      ValueError: with both values at the first checkpoint.
    """
    shapes = shapes_of_one(jax.tree.map(lambda x: x[None], query))
    output = featurizer_of(index, shapes)[0].rule.output
    _refuse(index, output)
    state = state_of(index)
    step: Any = output  # a `Program`, which has a hash
    run = _value_step(step, Program(split, (shapes,)))
    whole, parts = map(np.asarray, run(state.checkpoints[0], query, state.key))
    found, size = parts.astype(np.float64).sum(), np.abs(parts.astype(np.float64)).sum()
    # A mean of two targets is off by half of that size, and one without targets is 0 / 0.
    if np.isfinite(whole) and not abs(found - whole) <= 0.1 * size:
        raise ValueError(
            f"The outputs of a query's parts must add up to the query's, and add up to {found:.4g} "
            f"where it has {whole:.4g}: a mean over targets is no sum. Build the index of a sum, "
            "such as ja.language.loss."
        )


def part_products(
    index: Index,
    query: Example,
    part: Callable[[Example, jax.Array], Example],
    count: int,
    vectors: np.ndarray,
) -> np.ndarray:
    """Inner products of the features of a query's parts with vectors, without those features.

    The products of all parts with one vector are the derivative of their outputs along what the
    vector is in the parameters: one pass in forward mode, where features are a backward pass per
    part. What the parts have in common is computed once.

    Args:
      index: the index.
      query: ONE query.
      part: (query, number) -> that part, an example.
      count: of parts, t; their outputs add up to the query's.
      vectors: float [k, c * p], such as rows of the index.

    Returns:
      Float [k, t], those that `part_features` give.

    Raises:
      ValueError: as `part_features`.

    Cost: a pass in forward mode per vector; where queries are scaled to unit norm, a gradient too.
      Of functions without forward mode (`jax.custom_vjp`), the features of the parts.
    """
    shapes = shapes_of_one(jax.tree.map(lambda x: jnp.asarray(x)[None], query))
    featurize, method = featurizer_of(index, shapes)
    _refuse(index, featurize.rule.output)
    step = _product_step(featurize.rule, featurize.plan, method.kernel, part, count)
    state, given = state_of(index), jax.tree.map(jnp.asarray, query)
    # Over a power of two, since parameters may be of a type with little range.
    exponents = np.frexp(np.abs(vectors).max(axis=1, keepdims=True))[1]
    try:
        found = [step(state, given, each) for each in np.ldexp(vectors, -exponents)]
    except TypeError:  # a function with rules for its backward pass alone
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], query)

        def split(query: Example) -> Batch:
            return jax.vmap(functools.partial(part, query))(jnp.arange(count))

        return vectors @ np.asarray(part_features(index, batch, split).features, np.float64).T
    return np.ldexp(np.asarray(found, np.float64), exponents)


def _refuse(index: Index, output: OutputFn) -> None:
    """Raises where features of parts do not add up."""
    refuse_unit_norm(output, "Scoring the parts of a query")
    if index.link == "square":
        raise ValueError("Squares of parts do not add up: scores of this index are squares.")


@functools.lru_cache(maxsize=16)
def _product_step(rule: FeatureRule, plan: Plan, kernel: Kernel, part: Any, count: int) -> Any:
    """The jitted (state, one query, vector [c * p]) -> products with its parts [t]."""

    @jax.jit
    def run(state: QueryArrays, query: Example, vector: jax.Array) -> jax.Array:
        key = example_keys(state.key, jnp.array([-1]))[0]
        pieces = jnp.split(vector, len(state.checkpoints))
        each = [product(state, c, query, key, piece) for c, piece in enumerate(pieces)]
        return functools.reduce(jnp.add, each)

    def product(
        state: QueryArrays, number: int, query: Example, key: Key, vector: jax.Array
    ) -> jax.Array:
        params = state.checkpoints[number]
        of_leaves, leaves = as_function_of(rule.output, plan.rest | plan.covered, params)
        drawn, fitted = state.drawn[number], state.fitted[number]
        project = coordinates(rule.projection, plan, drawn, fitted)

        def outputs(leaves: Any) -> jax.Array:
            return each_example(lambda each: of_leaves(leaves, part(query, each), key))(
                jnp.arange(count)
            )

        def to_features(gradients: Any) -> jax.Array:
            phi = project(gradients)
            if isinstance(kernel, MapsQueries):
                return kernel.whiten(state.operators[number], phi[None])[0]
            return phi

        example, to_parameters = jax.vjp(to_features, leaves)
        (tangent,) = to_parameters(vector.astype(example.dtype))
        found = jax.jvp(outputs, (leaves,), (tangent,))[1]
        if not (rule.normalize or isinstance(kernel, MapsQueries)):
            return found
        whole = jax.grad(lambda leaves: outputs(leaves).sum())(leaves)
        return _over_norm(found, to_features(whole))

    return run


@functools.lru_cache(maxsize=16)
def _value_step(output: Any, split: Any) -> Any:
    """The jitted (params, one query, key) -> its output, and those of its parts [t]."""

    @jax.jit
    def run(params: Params, query: Example, key: Key) -> tuple[jax.Array, jax.Array]:
        one = example_keys(key, jnp.array([-1]))[0]
        parts = each_example(lambda part: output(params, part, one))(split(query))
        return output(params, query, one), parts

    return run


@functools.lru_cache(maxsize=16)
def _part_step(step: Any, normalize: bool, kernel: Kernel, split: Any) -> Any:
    """The jitted (state, one query, id) -> features of its parts, and whether they are finite."""
    mapping = kernel if isinstance(kernel, MapsQueries) else None
    scale = _unit_sum if normalize or mapping is not None else None
    functions = QueryFunctions(step, mapping, scale)

    @jax.jit
    def run(state: QueryArrays, query: Example, number: jax.Array) -> tuple[Features, jax.Array]:
        parts = split(query)
        ids = jnp.full(leading_size(parts), number)
        features, finite = features_of_batch(functions, state, parts, ids)
        return features, finite.all()

    return run


def _unit_sum(phi: Features) -> Features:
    """Scales rows together, so that their sum has unit norm; a sum of zero stays."""
    return _over_norm(phi, phi.sum(axis=0))


def _over_norm(x: jax.Array, of: jax.Array) -> jax.Array:
    """Returns x over the norm of a vector [p]; of a vector of zeros, x itself."""
    exponent = exponent_of(of)  # of a vector this small or large the squares are zero or infinite
    norm = jnp.linalg.norm(scaled(of, -exponent))
    return scaled(x.astype(wide(x.dtype)), -exponent) / jnp.where(norm == 0, 1, norm)
