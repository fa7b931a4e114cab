"""Features of queries: what an index is scored with.

Queries go through the featurizer alone, so weights multiply raw query features.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import whole_number
from jaxattr.features.bases import Drawn, Fitted
from jaxattr.features.expectations import refuse_unit_norm
from jaxattr.features.featurizer import FeatureRule, Featurizer, room
from jaxattr.index.index import Index, check_index, first_ids, report_non_finite
from jaxattr.inputs.data import Accepts, as_data
from jaxattr.inputs.matching import check_match
from jaxattr.inputs.outputs import runs
from jaxattr.inputs.traces import shapes_of
from jaxattr.inputs.wording import name_of
from jaxattr.kernels import MapsQueries
from jaxattr.methods.method import Method
from jaxattr.scales import unit_norm
from jaxattr.sharding import DATA, Placement, compiled, split_rows
from jaxattr.sources import Source, as_source, track
from jaxattr.typing import Example, Features, Key, OutputFn, Params


class QueryFeatures(NamedTuple):
    """Features of queries, so that several calls need not compute them again.

    Attributes:
      features: phi_c(q), one block of columns per checkpoint, [q, c * p].
      non_finite: positions of queries that have no finite gradient; their rows are zero.
      query_side: what they were computed with, `index.query_side`.
      residuals: of queries that were refined (`ja.astra`), relative errors of their solves [q], the
        largest of all checkpoints; else None.
    """

    features: Features
    non_finite: np.ndarray
    query_side: str
    residuals: np.ndarray | None = None


def query_features(index: Index, queries: Any, *, output: OutputFn | None = None) -> QueryFeatures:
    r"""Computes the queries' features once, for use in several calls.

    With `output` they ask about another function than the one that the index was built for: what
    made the model represent a concept, if it is a direction times activations, or the logit of a
    probe. Positive scores are then of training examples that raise it:

    .. math:: \mathrm{score}(q, n) \approx \tfrac{1}{\epsilon} \big[f(\theta + \epsilon u_n, q)
              - f(\theta, q)\big]

    with u_n where the method has training on n move the parameters: against the gradient of its
    loss, times an inverse curvature for those that have one. So it is the features of -f that are
    returned where the index is of a loss, and those of f where it is of a margin (`ja.trak`).

    Args:
      index: the index that they will be scored against.
      queries: arrays, a list of examples or a random-access source, as in `build_index`, with the
        fields that the function reads; or the result of an earlier call, returned as it is.
      output: f, (params, example, key) -> scalar. Default: the function of the index.

    Returns:
      The features. Queries draw their randomness, where the output is stochastic, from ids of
      their own: -1, -2, ... On a mesh they are computed on all devices, and every device gets all.

    Raises:
      TypeError: if the index, the queries or the output are something else.
      ValueError: if the index was opened without its method and checkpoints, or queries are no such
        examples as the training set's: says which fields differ; if the output is no float scalar
        or does not depend on the parameters, or is given with features that are there already.

    Warns:
      NonFiniteWarning: with the positions of queries whose gradient is not finite.
      UserWarning: with the positions of queries whose gradient is zero; of `output`, if it is for
        all queries.

    Cost: a gradient per query. Of matrices that `output` does not use as the index's function does,
      as what they are multiplied by, a whole gradient per query is in memory, a microbatch of them
      at a time.

    Example:
      >>> import jaxattr as ja
      >>> def hidden(params, example):
      ...     return jnp.tanh(params["a"] @ example["x"])
      >>> def loss(params, example, key):
      ...     return (params["b"] @ hidden(params, example) - example["y"]) ** 2
      >>> def concept(params, example, key):
      ...     return jnp.array([1.0, -1.0]) @ hidden(params, example)
      >>> train = {"x": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "y": jnp.array([1.0, -1.0])}
      >>> params = {"a": jnp.array([[0.1, 0.0], [0.0, 0.1]]), "b": jnp.array([1.0, -1.0])}
      >>> index = ja.build_index(ja.tracin(loss), params, train)
      >>> queries = ja.query_features(index, {"x": jnp.array([[1.0, 1.0]])}, output=concept)
      >>> print(ja.score(index, queries).round(1))  # the first raises it, the second lowers it
      [[ 3.5 -3.5]]
    """
    accepts = accepted_by(index, output)
    if isinstance(queries, QueryFeatures):
        if output is not None:
            raise ValueError(
                "output is of queries whose features are to be computed, and these are "
                "QueryFeatures already: pass the queries themselves."
            )
        return _checked(index, queries)
    source = _source_of(queries, accepts)
    found = _features_of(index, source, range(source.size), output)
    return found if output is None else _raising(index, output, found)


def _source_of(queries: Any, accepts: Accepts) -> Source:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(queries)):
        raise TypeError(
            "The queries are traced, as within jax.jit, and those that are not finite could not be "
            "named. Use ja.attributor(index, k=...), which is made for that; or compute their "
            "features outside, ja.query_features(index, queries), and let the function that is "
            "compiled close over them."
        )
    return as_source(queries, "queries", accepts)


def in_groups(
    index: Index, queries: Any, at_once: int | None
) -> tuple[int, Iterator[QueryFeatures]]:
    """Computes the features of some queries after the other, for what need not have all at once.

    Args:
      index: as in `query_features`.
      queries: see there; features that were computed before are one group.
      at_once: queries per group. Default: as many as have room in a quarter of the device's memory
        (1 GiB on a CPU).

    Returns:
      The number of queries in all, and the features of one group after the other.
    """
    if at_once is not None:
        at_once = whole_number("queries_at_once", at_once)
    if isinstance(queries, QueryFeatures):
        prepared = _checked(check_index(index), queries)
        return len(prepared.features), iter([prepared])
    source = _source_of(queries, accepted_by(index))
    if at_once is None:
        numbers = index.layout.total * index.rows.layout.checkpoints
        at_once = max(1, room() // (numbers * index.rows.layout.wide.itemsize))
    n = source.size
    size = -(-n // -(-n // at_once))  # none is much smaller than the others, as each is a pass
    groups = [range(start, min(start + size, n)) for start in range(0, n, size)]
    return n, (_features_of(index, source, group) for group in groups)


def _features_of(
    index: Index, source: Source, group: range, output: OutputFn | None = None
) -> QueryFeatures:
    """Features of consecutive queries."""
    functions = functions_of(index, source.example, output)
    features, finite = _streamed(index, source, functions, "queries", group)
    lost = np.flatnonzero(~finite)
    report_non_finite(group.start + lost, source.size, "queries")
    if output is None and not isinstance(features, jax.core.Tracer):
        _warn_of_zeros(group.start + np.flatnonzero(finite & ~np.asarray(_there(features))))
    return QueryFeatures(features, lost, index.query_side)


@jax.jit
def _there(features: Features) -> jax.Array:
    return jnp.any(features != 0, axis=1)


def _warn_of_zeros(positions: np.ndarray) -> None:
    if len(positions):
        warnings.warn(
            f"Queries at positions {first_ids(positions)} have a gradient of zero, and so are all "
            "of their scores, which rank nothing: the model fits them exactly, or nothing of them "
            "counts (a mask).",
            UserWarning,
            stacklevel=4,
        )


def _raising(index: Index, output: OutputFn, found: QueryFeatures) -> QueryFeatures:
    """Features of another output, with the sign that makes scores positive where it is raised."""
    assert index.method is not None
    if len(found.non_finite) < len(found.features) and not found.features.any():
        warnings.warn(
            f"The gradient of {name_of(output)!r} is zero for all queries, and so are all scores: "
            "it uses no parameters that are in a group, or stops their gradients.",
            UserWarning,
            stacklevel=3,
        )
    return found if index.method.raised else found._replace(features=-found.features)


def contrast(
    index: Index, better: Any, worse: Any, *, output: OutputFn | None = None
) -> QueryFeatures:
    """Makes queries of differences: why this, and not that?

    Each asks what made the model prefer `better[i]` to `worse[i]`, such as two answers to one
    question, or one picture under two labels. Use it wherever queries go: `ja.top_k(index,
    ja.contrast(index, chosen, rejected))`.

    Args:
      index: that it will be scored against.
      better: q queries, as in `ja.score`.
      worse: as many, in the same order; their shapes may differ from those of `better`.
      output: f, as in `query_features`; proponents then raise f(better) - f(worse).

    Returns:
      Features [q, c * p] of f(better) - f(worse), f the function that is attributed: a pair draws
      the same randomness twice. Scores are those of `better` less those of `worse`, so that
      proponents speak for `better`. Methods that scale to unit norm (GradCos, TrackStar) scale the
      difference, not its parts: scores are then those of the function f(better) - f(worse), and no
      difference of scores. Pairs of which one is not finite are marked.

    Raises:
      TypeError: if the index or the queries are something else.
      ValueError: if there are not as many of both; as `query_features`; or if features are not
        linear in the function: squared scores, unit norm per draw.

    Warns:
      NonFiniteWarning: with the positions of pairs whose gradients are not finite.

    Cost: the features of 2 q queries.
    """
    if check_index(index).link == "square":
        raise ValueError(
            "Scores of this index are squares, which do not say for which of two a training "
            'example speaks. Build it with link="identity".'
        )
    sides = {"better": better, "worse": worse}
    for role, queries in sides.items():
        if isinstance(queries, QueryFeatures):
            raise TypeError(
                f"{role} is QueryFeatures, which may have been scaled already: pass the queries "
                "themselves."
            )
    accepts = accepted_by(index, output)
    sources = [as_source(queries, role, accepts) for role, queries in sides.items()]
    sizes = [source.size for source in sources]
    if sizes[0] != sizes[1]:
        raise ValueError(f"better and worse must be pairs, got {sizes[0]} and {sizes[1]} examples.")
    (first, finite), (second, also_finite) = (
        _streamed(index, source, functions_of(index, source.example, output, linear=True), role)
        for role, source in zip(sides, sources, strict=True)
    )
    difference = first - second
    kept = finite & also_finite & np.asarray(jnp.isfinite(difference).all(axis=1))
    difference = jnp.where(kept[:, None], difference, 0)
    assert index.featurizer is not None and index.method is not None
    if index.featurizer.rule.normalize or isinstance(index.method.kernel, MapsQueries):
        each = jnp.split(difference, len(index.checkpoints), axis=1)
        difference = jnp.concatenate([unit_norm(phi) for phi in each], axis=1)
    report_non_finite(np.flatnonzero(~kept), len(kept), "pairs of queries")
    found = QueryFeatures(difference, np.flatnonzero(~kept), index.query_side)
    return found if output is None else _raising(index, output, found)


def as_queries(index: Index, queries: Any) -> Any:
    """Returns queries as arrays, a source or features, for functions that look at them twice.

    Args:
      index: that they are for.
      queries: as in `query_features`.
    """
    if isinstance(queries, QueryFeatures):
        return queries
    return as_data(queries, "queries", accepted_by(index))


class QueryArrays(NamedTuple):
    """The arrays of an index that queries need, one of each per checkpoint.

    Attributes:
      key: of projections and stochastic outputs.
      checkpoints: the parameters.
      drawn: the projections.
      fitted: what the basis was fitted to.
      operators: of kernels that queries need; () of others.
    """

    key: Key
    checkpoints: tuple[Params, ...]
    drawn: tuple[Drawn, ...]
    fitted: tuple[Fitted, ...]
    operators: tuple[Any, ...]


def state_of(index: Index) -> QueryArrays:
    """Returns the arrays of an index that queries need."""
    if index.featurizer is None:
        raise _without_method()
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(index.checkpoints)):
        raise ValueError(
            "The parameters of this index are deleted: a step of training took their memory "
            "(donate_argnums). Queries need them: build or open the index with a copy, "
            "jax.tree.map(jnp.copy, params)."
        )
    key, checkpoints = index.featurizer.key, index.place.whole(index.checkpoints)
    return QueryArrays(key, checkpoints, index.drawn, index.fitted, index.operators)


class QueryFunctions(NamedTuple):
    """The functions of an index that queries need; the same for indexes of one method.

    Attributes:
      step: (key, params, batch, ids, drawn, fitted) -> features and residual.
      kernel: that transforms queries too; None if the method's leaves them alone.
      scale: of features after that, if they are scaled.
    """

    step: Any
    kernel: MapsQueries | None
    scale: Callable[[Features], Features] | None


def functions_of(
    index: Index, example: Example, output: OutputFn | None = None, *, linear: bool = False
) -> QueryFunctions:
    """Returns the functions of an index that queries need.

    Args:
      index: the index.
      example: ONE query, or its shapes.
      output: of queries, if it is another than the index's.
      linear: without unit norm, for a contrast: features are linear in the output.
    """
    featurize, method = featurizer_of(index, example, output)
    kernel = method.kernel if isinstance(method.kernel, MapsQueries) else None
    if linear:
        refuse_unit_norm(featurize.rule.output, "A contrast")
        return QueryFunctions(featurize.unscaled(), kernel, None)
    return QueryFunctions(featurize.step, kernel, None if kernel is None else unit_norm)


def features_of_batch(
    functions: QueryFunctions, state: QueryArrays, batch: Any, ids: jax.Array
) -> tuple[Features, jax.Array]:
    """Features of one batch of queries for all checkpoints; pure and jittable.

    Args:
      functions: of the index.
      state: its arrays, as an argument so that they are no constants of the program.
      batch: a pytree of arrays [b, ...].
      ids: integers [b].

    Returns:
      Features [b, c * p], with rows of zeros where they are not finite; and which are, bool [b].
    """
    columns = []
    for number, params in enumerate(state.checkpoints):
        drawn, fitted = state.drawn[number], state.fitted[number]
        phi = functions.step(state.key, params, batch, ids, drawn, fitted).features
        if functions.kernel is not None:
            phi = functions.kernel.whiten(state.operators[number], phi)
        columns.append(phi if functions.scale is None else functions.scale(phi))
    return _of_all_checkpoints(columns)


@jax.jit
def _of_all_checkpoints(columns: list[Features]) -> tuple[Features, jax.Array]:
    features = jnp.concatenate(columns, axis=1)
    finite = jnp.isfinite(features).all(axis=1)
    return jnp.where(finite[:, None], features, 0), finite


def _streamed(
    index: Index,
    source: Source,
    functions: QueryFunctions,
    role: str,
    group: range | None = None,
) -> tuple[Features, np.ndarray]:
    """Features of queries, by default of all, zero where not finite; and which are, bool [q]."""
    group = range(source.size) if group is None else group
    step = _query_step(index.place, functions)
    # A power of two, so that a few programs serve any number of queries.
    block = split_rows(min(index.batch_size, 1 << (len(group) - 1).bit_length()), index.place)
    state, count = state_of(index), -(-len(group) // block)
    rows: Any = None
    finite = []
    for each in track(source.part(group).blocks(block, index.place), role, count):
        numbers = -1 - group.start - each.start - np.arange(block)
        ids = index.place.batch(lambda rows: rows, numbers)
        features, good = map(index.place.gathered, step(state, each.batch, ids))
        part = features[: len(group) - each.start]
        if rows is None:
            whole = jax.ShapeDtypeStruct((len(group), part.shape[1]), part.dtype)
            rows = part if count == 1 else index.place.zeros(whole, lambda path: ())
        if count > 1:
            # Not joined at the end, which would hold all of them twice.
            rows = compiled(index.place, _inserted, donate_argnums=0)(rows, part, each.start)
        finite.append(good)
    return rows, np.concatenate([np.asarray(good) for good in finite])[: len(group)]


_inserted = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)


def featurizer_of(
    index: Index, example: Example, output: OutputFn | None = None
) -> tuple[Featurizer, Method]:
    """Returns the featurizer of queries, and the method.

    Args:
      index: the index.
      example: ONE query, or its shapes.
      output: of queries, if it is another than the index's.
    """
    if index.featurizer is None or index.method is None:
        raise _without_method()
    featurize, method, params = index.featurizer, index.method, index.checkpoints[0]
    other = method.query_output if output is None else output
    if other is not None:
        return featurize.of(other, params, example), method
    check_match(featurize.rule.output, params, featurize.example, example, featurize.key)
    if _hashable(featurize.example) == _hashable(example):
        return featurize, method
    # Functions that compute the same of training examples share a step, and may differ elsewhere.
    return _of_shapes(featurize, *_hashable(params), *_hashable(example)), method


@functools.lru_cache(maxsize=64)
def _of_shapes(
    featurize: Featurizer, params: tuple, of_params: Any, example: tuple, of_example: Any
) -> Featurizer:
    given = jax.tree.unflatten(of_params, params), jax.tree.unflatten(of_example, example)
    rule = FeatureRule(featurize.rule.output).traced(*given, featurize.key, anew=True)
    return featurize.of(rule.output, *given)


def _hashable(tree: Any) -> tuple[tuple[Any, ...], Any]:
    leaves, structure = jax.tree.flatten(shapes_of(tree))
    return tuple(leaves), structure


def accepted_by(index: Index, output: OutputFn | None = None) -> Accepts:
    """Returns the function that says whether an index can be scored with a query of some shapes.

    Args:
      index: that it would be scored with.
      output: of queries, if it is another than the index's.
    """
    return functools.partial(_takes, check_index(index), output)


def _takes(index: Index, output: OutputFn | None, example: Example) -> bool:
    """Whether the index can be scored with such a query."""
    if index.featurizer is None or index.method is None:
        return False
    output = output or index.method.query_output or index.featurizer.rule.output
    return runs(output, index.checkpoints[0], example)


def _without_method() -> ValueError:
    return ValueError(
        "This index was opened without its method, so it cannot compute features of queries. "
        "Pass them as ja.open_index(path, method, checkpoints), or pass QueryFeatures."
    )


def _checked(index: Index, queries: QueryFeatures) -> QueryFeatures:
    expected = index.layout.total * index.rows.layout.checkpoints
    if queries.features.ndim != 2 or queries.features.shape[1] != expected:
        raise ValueError(
            f"The queries' features must be [q, {expected}], as this index has them, got shape "
            f"{list(queries.features.shape)}: they belong to another index."
        )
    if not len(queries.features):
        raise ValueError("The queries' features are of no query.")
    if queries.query_side != index.query_side:
        raise ValueError(
            "The queries' features belong to another index: it has another method, other groups, "
            "checkpoints or key, or was fitted to other data. Compute them with this index: "
            "ja.query_features(index, queries)."
        )
    return queries


@functools.lru_cache(maxsize=64)
def _query_step(place: Placement, functions: QueryFunctions) -> Any:
    step = functools.partial(features_of_batch, functions)
    # On one device each checkpoint's program is compiled by itself, once.
    return step if place.mesh is None else place.jit(step, DATA)
