"""The index: features of the training set, multiplied by the kernel, ready to be scored against.

Two passes: the first computes features and accumulates the kernel's statistics, the second applies
the kernel. Queries go through the first pass alone, so weights multiply raw query features.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import groups as groups_lib
from jaxattr.bases import NOTHING, Fitted
from jaxattr.features import Featurizer, leading_size
from jaxattr.groups import Groups
from jaxattr.hessians import hessian_products
from jaxattr.kernels import Kernel, Surroundings
from jaxattr.methods import Method, featurizer
from jaxattr.plans import FeatureLayout
from jaxattr.sources import Block, as_source, track
from jaxattr.training_passes import NumberedBatch, TrainingPass
from jaxattr.typing import Features, Key, Params


class NonFiniteWarning(UserWarning):
    """Examples were left out because their gradients, or scores, are not finite."""


class ConvergenceWarning(UserWarning):
    """An iterative solve ended before it reached its tolerance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """A training set, featurised. Made by `build_index`.

    Attributes:
      method: the attribution method.
      featurizer: maps a batch to features [b, p], for one checkpoint.
      checkpoints: the parameters, one pytree per checkpoint.
      features: eta_c K_c phi_c(n), one block of columns per checkpoint, [n, c * p]. Rows of
        `non_finite` examples are zero.
      residual: r, multiplies each training example's scores, [n].
      self_contributions: each example's contribution to its own score, per group, [n, m].
      non_finite: ids of training examples that have no finite gradient, and so no score.
      batch_size: examples per step.
      fitted: what the method's basis was fitted to, one per checkpoint; `captured` in it is the
        share of the trace that leading eigenvectors hold.
      operators: what the kernel applies to queries, one per checkpoint; () if it leaves them alone.
      solve_errors: relative residual of each training example's solve, the worst of all
        checkpoints, [n]; None for kernels that do not iterate.
    """

    method: Method
    featurizer: Featurizer
    checkpoints: tuple[Params, ...]
    features: Features
    residual: jax.Array
    self_contributions: jax.Array
    non_finite: np.ndarray
    batch_size: int
    fitted: tuple[Fitted, ...]
    operators: tuple[Any, ...]
    solve_errors: np.ndarray | None

    @property
    def layout(self) -> FeatureLayout:
        """Group names and the columns of each, within one checkpoint."""
        return self.featurizer.layout

    @property
    def size(self) -> int:
        """Number of training examples n."""
        return self.features.shape[0]

    def __repr__(self) -> str:
        return (
            f"Index({self.method.name}: {self.size} training examples, {len(self.layout.names)} "
            f"groups, {self.layout.total} features, {len(self.checkpoints)} checkpoints, "
            f"{len(self.non_finite)} not finite)"
        )


class QueryFeatures(NamedTuple):
    """Features of queries, so that several calls need not compute them again.

    Attributes:
      features: phi_c(q), one block of columns per checkpoint, [q, c * p].
      non_finite: positions of queries that have no finite gradient; their rows are zero.
    """

    features: Features
    non_finite: np.ndarray


def build_index(
    method: Method,
    checkpoints: Params | Sequence[Params],
    train: Any,
    *,
    groups: Groups = groups_lib.by_layer,
    key: Key | None = None,
    batch_size: int = 256,
    microbatch: int | None = None,
) -> Index:
    """Featurises a training set and applies the method's kernel to it, in memory.

    Args:
      method: `ja.tracin(loss)`, `ja.trak(margin)`, ...
      checkpoints: one params pytree, or a list or tuple of them. Params that are themselves a list
        or tuple go in as `[params]`.
      train: a pytree of arrays with a common leading axis, or a random-access source
        (`__len__`, `__getitem__`). Position n is the example's id.
      groups: `by_layer`, `by_leaf`, a layout, or a pytree of labels.
      key: key of projections and of stochastic outputs. Default: `jax.random.key(0)`.
      batch_size: examples per step.
      microbatch: examples whose gradients are in memory at once. Default: as many as fit 256 MiB.

    Returns:
      The index; n * c * p numbers.

    Raises:
      ValueError: if checkpoints differ in structure, the data are empty or ragged, the output is
        no scalar, the groups are no partition, a kernel is singular, or no gradient is finite.

    Warns:
      NonFiniteWarning: with the ids of training examples that were left out.
      ConvergenceWarning: with the ids of those whose solve did not converge.
      TruncationWarning: if leading eigenvectors hold little of the curvature.
    """
    parameters = _checkpoints(checkpoints)
    source = as_source(train, "train")
    eta = method.weights_of(len(parameters))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    featurize = featurizer(
        method, parameters[0], source.example, groups=groups, key=key, microbatch=microbatch
    )
    passes = [
        _one_checkpoint(method, TrainingPass(featurize, params, number, source, batch_size))
        for number, params in enumerate(parameters)
    ]
    finite = functools.reduce(np.logical_and, [result.finite for result in passes])
    _report(np.flatnonzero(~finite), source.size, "training examples")
    kept = jnp.asarray(finite)[:, None]
    features = _joined([one.features for one in passes], eta, None if finite.all() else kept)
    selves = [one.self_contributions * scale for one, scale in zip(passes, eta, strict=True)]
    residual = sum(result.residual for result in passes) / len(passes)
    return Index(
        method=method,
        featurizer=featurize,
        checkpoints=parameters,
        features=features,
        residual=jnp.where(kept[:, 0], residual, 0),
        self_contributions=jnp.where(kept, functools.reduce(jnp.add, selves), 0),
        non_finite=np.flatnonzero(~finite),
        batch_size=batch_size,
        fitted=tuple(one.fitted for one in passes),
        operators=tuple(one.operator for one in passes if method.kernel.of_queries is not None),
        solve_errors=_solve_errors(method, passes),
    )


def query_features(index: Index, queries: Any) -> QueryFeatures:
    """Computes the queries' features once, for use in several calls.

    Args:
      index: the index that they will be scored against.
      queries: a pytree of arrays or a random-access source, as in `build_index`; or the result of
        an earlier call, which is returned as it is.

    Returns:
      The features. Queries draw their randomness, where the output is stochastic, from ids of
      their own: -1, -2, ...

    Warns:
      NonFiniteWarning: with the positions of queries whose gradient is not finite.
    """
    if isinstance(queries, QueryFeatures):
        return queries
    source = as_source(queries, "queries")
    blocks = [
        _block_features(index, block)
        for block in track(
            source.blocks(index.batch_size),
            "queries",
            -(-source.size // index.batch_size),
        )
    ]
    features = jnp.concatenate([features for features, _ in blocks])[: source.size]
    finite = np.concatenate([np.asarray(finite) for _, finite in blocks])[: source.size]
    _report(np.flatnonzero(~finite), source.size, "queries")
    return QueryFeatures(features, np.flatnonzero(~finite))


class State(NamedTuple):
    """The arrays of an index that queries need, one of each per checkpoint.

    Attributes:
      checkpoints: the parameters.
      fitted: what the basis was fitted to.
      operators: what the kernel applies to queries; () if it leaves them alone.
    """

    checkpoints: tuple[Params, ...]
    fitted: tuple[Fitted, ...]
    operators: tuple[Any, ...]


def state_of(index: Index) -> State:
    """Returns the arrays of an index that queries need."""
    return State(index.checkpoints, index.fitted, index.operators)


def features_of_batch(
    index: Index, state: State, batch: Any, ids: jax.Array
) -> tuple[Features, jax.Array]:
    """Features of one batch of queries for all checkpoints; pure and jittable.

    Args:
      index: the index.
      state: its arrays, as an argument so that they are no constants of the program.
      batch: a pytree of arrays [b, ...].
      ids: integers [b].

    Returns:
      Features [b, c * p], with rows of zeros where they are not finite; and which are, bool [b].
    """
    of_queries = index.method.kernel.of_queries
    columns = []
    for number, params in enumerate(state.checkpoints):
        phi = index.featurizer(params, batch, ids, number, state.fitted[number])
        columns.append(phi if of_queries is None else of_queries(state.operators[number], phi))
    features = jnp.concatenate(columns, axis=1)
    finite = jnp.isfinite(features).all(axis=1)
    return jnp.where(finite[:, None], features, 0), finite


class _Pass(NamedTuple):
    features: Features
    residual: jax.Array
    self_contributions: jax.Array
    finite: np.ndarray
    fitted: Fitted
    operator: Any
    solve_errors: np.ndarray | None


def _one_checkpoint(method: Method, over: TrainingPass) -> _Pass:
    """Basis, features, kernel and self-contributions of one checkpoint."""
    basis, layout = method.rule.projection.basis, over.featurizer.layout
    fitted = NOTHING if basis is None or basis.fit is None else basis.fit(over)
    rows: Features | None = None
    statistics: Any = None
    residuals, finite, kept, start = [], [], [], 0
    for numbered, clean in over.features(fitted, "features"):
        real = int(numbered.real.sum())
        phi = clean.features if real == len(clean.features) else clean.features[:real]
        if rows is None:
            rows = jnp.zeros((over.source.size, layout.total), phi.dtype)
            statistics = method.kernel.init(layout, over.source.size, phi.dtype)
        rows, statistics = _accumulate(
            method.kernel.update, rows, statistics, phi, start, clean.kept.sum()
        )
        start += real
        residuals.append(clean.residual[:real])
        finite.append(np.asarray(clean.finite)[:real])
        kept.append(clean.kept[:real])
    assert rows is not None
    if not np.concatenate(finite).any():
        raise ValueError(
            f"No training example has a finite gradient at checkpoint {over.number}: the "
            "parameters or the data are not finite, or the training diverged. Check the checkpoint."
        )
    operator = None
    if not method.kernel.identity:
        surroundings = _surroundings(over, fitted, jnp.concatenate(kept))
        operator = method.kernel.finalize(statistics, surroundings)
    del statistics
    rows, selves, errors = _apply(method.kernel, layout, operator, rows, over.batch_size)
    return _Pass(
        rows,
        jnp.concatenate(residuals),
        selves,
        np.concatenate(finite),
        fitted,
        operator,
        errors,
    )


def _as_queries(numbered: NumberedBatch) -> NumberedBatch:
    """Queries draw their randomness from -1, -2, ..."""
    return numbered._replace(ids=-1 - numbered.ids)


def _joined(parts: list[Features], eta: Sequence[float], kept: jax.Array | None) -> Features:
    """Scales and joins the checkpoints' features, copying only what must be."""
    if any(scale != 1 for scale in eta):
        parts = [part * scale for part, scale in zip(parts, eta, strict=True)]
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return joined if kept is None else jnp.where(kept, joined, 0)


def _surroundings(over: TrainingPass, fitted: Fitted, kept: jax.Array) -> Surroundings:
    def features_of(data: Any, description: str) -> Iterator[tuple[Features, int]]:
        other = over.of(as_source(data, description))
        for _, clean in other.features(fitted, description, _as_queries):
            yield clean.features, int(clean.kept.sum())

    return Surroundings(
        layout=over.featurizer.layout,
        curvature=None if fitted.curvature is None else np.asarray(fitted.curvature),
        features_of=features_of,
        hessian=lambda: hessian_products(over, fitted, kept),
    )


def _checkpoints(checkpoints: Params | Sequence[Params]) -> tuple[Params, ...]:
    several = isinstance(checkpoints, list | tuple)
    parameters = tuple(checkpoints) if several else (checkpoints,)
    if not parameters:
        raise ValueError("checkpoints is empty: pass one params pytree, or a list of them.")
    expected = jax.tree.map(jnp.shape, parameters[0])
    for number, params in enumerate(parameters):
        found = jax.tree.map(jnp.shape, params)
        if found != expected:
            raise ValueError(
                f"Checkpoint {number} differs from checkpoint 0 in its tree or shapes: got "
                f"{found}, needed {expected}. If your params are themselves a list or tuple, pass "
                "[params]."
            )
    return parameters


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _accumulate(
    update: Any, rows: Features, statistics: Any, phi: Features, start: int, kept: jax.Array
) -> tuple[Features, Any]:
    rows = jax.lax.dynamic_update_slice_in_dim(rows, phi, start, 0)
    return rows, update(statistics, phi, jnp.asarray(start), kept)


def _apply(
    kernel: Kernel, layout: FeatureLayout, operator: Any, rows: Features, batch_size: int
) -> tuple[Features, jax.Array, np.ndarray | None]:
    """Replaces rows by K phi, block by block and in place.

    Returns:
      K phi [n, p]; contributions of examples to their own scores [n, m]; and, where K is solved
      with, the relative residual of each solve [n].
    """
    n = rows.shape[0]
    starts = range(0, n, batch_size)
    selves, errors = [], []
    # Programs apart, since XLA fuses them into one that takes twice as long on a CPU.
    apply, residual = _compiled_kernel(kernel)
    for start in track(starts, kernel.name, len(starts)):
        phi = rows[start : min(start + batch_size, n)]
        mapped, of_queries = apply(operator, phi)
        selves.append(_self_contributions(layout, of_queries, mapped))
        if residual is not None:
            errors.append(np.asarray(residual(operator, phi, mapped)))
        rows = _write(rows, mapped, start)
    return rows, jnp.concatenate(selves), np.concatenate(errors) if errors else None


@functools.lru_cache(maxsize=16)
def _compiled_kernel(kernel: Kernel) -> tuple[Any, Any]:
    def apply(operator: Any, phi: Features) -> tuple[Features, Features]:
        of_queries = phi if kernel.of_queries is None else kernel.of_queries(operator, phi)
        return kernel.apply(operator, phi), of_queries

    return jax.jit(apply), None if kernel.residual is None else jax.jit(kernel.residual)


@functools.partial(jax.jit, static_argnums=0)
def _self_contributions(layout: FeatureLayout, phi: Features, mapped: Features) -> jax.Array:
    products = phi * mapped
    return jnp.stack([products[:, part].sum(axis=1) for part in layout.slices.values()], axis=1)


@functools.partial(jax.jit, donate_argnums=0)
def _write(rows: Features, block: Features, start: int) -> Features:
    return jax.lax.dynamic_update_slice_in_dim(rows, block, start, 0)


def _solve_errors(method: Method, passes: Sequence[_Pass]) -> np.ndarray | None:
    """The worst residual per training example; warns of those that did not converge."""
    found = [one.solve_errors for one in passes if one.solve_errors is not None]
    if not found:
        return None
    errors = functools.reduce(np.maximum, found)
    failed = np.flatnonzero(~(errors <= method.kernel.tolerance))
    if len(failed):
        warnings.warn(
            f"{len(failed)} of {len(errors)} solves did not converge: relative residuals up to "
            f"{errors[failed].max():.1e}, needed {method.kernel.tolerance:.1e}; ids "
            f"{_first(failed)}. Allow more iterations, or use more damping: the Hessian may have "
            "negative eigenvalues.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return errors


def _block_features(index: Index, block: Block) -> tuple[Features, jax.Array]:
    rows = jnp.arange(leading_size(block.batch))
    return features_of_batch(index, state_of(index), block.batch, -1 - block.start - rows)


def _first(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


def _report(positions: np.ndarray, total: int, what: str) -> None:
    if len(positions):
        warnings.warn(
            f"{len(positions)} of {total} {what} have gradients that are not finite and were left "
            f"out: ids {_first(positions)}.",
            NonFiniteWarning,
            stacklevel=3,
        )
