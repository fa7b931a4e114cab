"""The index: features of the training set, multiplied by the kernel, ready to be scored against.

Queries go through the featurizer alone, so weights multiply raw query features.
"""

import dataclasses
import functools
import os
import warnings
from typing import Any, NamedTuple

import numpy as np

from jaxattr import markup
from jaxattr.counts import counted
from jaxattr.features.bases import Drawn, Fitted
from jaxattr.features.featurizer import Featurizer
from jaxattr.features.plans import FeatureLayout
from jaxattr.index import provenance
from jaxattr.inputs.arrays import check_context
from jaxattr.inputs.traces import eagerly
from jaxattr.inputs.wording import brief
from jaxattr.methods.method import Method
from jaxattr.sharding import Placement
from jaxattr.sources import Source
from jaxattr.store.rows import COLUMNS, EXAMPLES, FEATURES, NO_SIZE, SELF, SELF_COLUMNS, Rows
from jaxattr.typing import Link, Params


class NonFiniteWarning(UserWarning):
    """Examples were left out because their gradients, or scores, are not finite."""


class ConvergenceWarning(UserWarning):
    """An iterative solve ended before it reached its tolerance."""


class Recorded(NamedTuple):
    """What an index on disk says of itself; as in `Index`."""

    query_side: str
    exponent: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """A training set, featurised. Made by `build_index` and `open_index`.

    Attributes:
      method: the attribution method; None if the index was opened without.
      featurizer: maps a batch to features [b, p], for one checkpoint; None likewise.
      checkpoints: the parameters, one pytree per checkpoint; () likewise.
      layout: group names and the columns of each, within one checkpoint.
      rows: eta_c K_c phi_c(n) and what else there is per training example, in memory or on disk.
      non_finite: ids of training examples that have no finite gradient, and so no score.
      fitted: what the method's basis was fitted to, one per checkpoint; `captured` in it is the
        share of the trace that leading eigenvectors hold.
      operators: of kernels that queries need, one per checkpoint; () of others.
      solve_errors: relative residual of each training example's solve, the worst of all
        checkpoints, [n]; None for kernels that do not iterate.
      path: where it is on disk; None if it is in memory.
      link: what is done to sums of contributions to make them scores.
      recorded: what the index on disk says of itself; None if it is in memory.
      train: the training examples, to be shown; None if it was opened without them.
    """

    method: Method | None
    featurizer: Featurizer | None
    checkpoints: tuple[Params, ...]
    layout: FeatureLayout
    rows: Rows
    non_finite: np.ndarray
    fitted: tuple[Fitted, ...]
    operators: tuple[Any, ...]
    solve_errors: np.ndarray | None
    path: str | os.PathLike[str] | None = None
    link: Link = "identity"
    recorded: Recorded | None = None
    train: Source | None = None

    @property
    def size(self) -> int:
        """Number of training examples n."""
        return self.rows.layout.size

    @property
    def batch_size(self) -> int:
        """Examples per block."""
        return self.rows.layout.block

    @functools.cached_property
    def drawn(self) -> tuple[Drawn, ...]:
        """The projections of each checkpoint."""
        assert self.featurizer is not None
        draw = functools.partial(self.featurizer.draw, place=self.place)
        # They are kept: where a user's `jit` is the first that asks, they are arrays all the same.
        with eagerly():
            return tuple(draw(number, fitted) for number, fitted in enumerate(self.fitted))

    @functools.cached_property
    def query_side(self) -> str:
        """Identity of all that decides the features of a query; `QueryFeatures` carry it."""
        if self.recorded is not None:
            return self.recorded.query_side
        assert self.featurizer is not None
        given = (self.featurizer, self.checkpoints, self.fitted, self.operators)
        with eagerly():  # as for `drawn`
            return provenance.query_side(*given)

    @functools.cached_property
    def exponent(self) -> np.ndarray:
        """All features of training examples are below 2 to this power; int32."""
        if self.recorded is not None:
            return np.asarray(self.recorded.exponent, np.int32)
        column = slice(SELF_COLUMNS.size, None)
        with eagerly():  # as for `drawn`
            checkpoints = range(self.rows.layout.checkpoints)
            largest = np.max([self.rows.column(SELF, c, column) for c in checkpoints])
        return np.asarray(0 if largest == NO_SIZE else largest, np.int32)

    @property
    def precision(self) -> str:
        """The dtype of the stored features, by name."""
        return np.dtype(self.rows.layout.dtypes[FEATURES]).name

    @property
    def place(self) -> Placement:
        """The devices that it is spread over."""
        return self.rows.place

    @property
    def features(self) -> np.ndarray:
        """eta_c K_c phi_c(n) of all checkpoints, [n, c * p]; on the host, so for small indexes."""
        each = self._each(FEATURES)
        return self._counted(each[0] if len(each) == 1 else np.concatenate(each, axis=1))

    @property
    def residual(self) -> np.ndarray:
        """r, multiplies each training example's scores, [n]; on the host."""
        return self._counted(np.mean(self._each(EXAMPLES), axis=0)[:, COLUMNS.residual])

    @property
    def self_contributions(self) -> np.ndarray:
        """Each example's contribution to its own score, per group, [n, m]; on the host."""
        each = np.stack(self._each(SELF), axis=1)  # [n, c, m + 2]
        return self._counted(self_contributions(each))

    def _where(self) -> str:
        if self.path is not None:
            return f"on disk at {self.path}"
        return "in memory" if self.rows.resident else "features made anew at each pass"

    def _each(self, name: str) -> list[np.ndarray]:
        """One array [n, width] per checkpoint."""
        with eagerly():  # on the host also where a user's `jit` asks
            return [self.rows.column(name, c) for c in range(self.rows.layout.checkpoints)]

    def _counted(self, values: np.ndarray) -> np.ndarray:
        """With zeros for examples that do not count."""
        values[self.non_finite] = 0
        return values

    def __repr__(self) -> str:
        name = "opened without its method" if self.method is None else self.method.name
        shards = self.place.shards
        return (
            f"Index({name}: {counted(self.size, 'training example')}, "
            f"{counted(len(self.layout.names), 'group')}, "
            f"{counted(self.layout.total, 'feature')}, "
            f"{counted(self.rows.layout.checkpoints, 'checkpoint')}, "
            f"{len(self.non_finite)} not finite"
            + (f", over {shards} devices" if shards > 1 else "")
            + ("" if self.rows.resident else f", {self._where()}")
            + ")"
        )

    def _repr_html_(self) -> str:
        """For notebooks: what it is made of."""
        unnamed = "opened without its method"
        rows = [
            ("method", unnamed if self.method is None else self.method.name),
            ("kernel", unnamed if self.method is None else self.method.kernel.name),
            ("training examples", f"{self.size:,}"),
            ("not finite, left out", f"{len(self.non_finite):,}"),
            ("groups", f"{len(self.layout.names):,}"),
            ("features", f"{self.layout.total:,}"),
            ("checkpoints", self.rows.layout.checkpoints),
            ("stored as", self.precision),
            ("devices", self.place.shards),
            ("where", self._where()),
        ]
        return markup.table((), rows, "Index")


def check_index(index: Any) -> Index:
    """Returns what a user passed as an index, if it is one.

    Args:
      index: of `build_index` or `open_index`.

    Raises:
      TypeError: if it is something else.
      ValueError: if it is on a mesh, within `jax.set_mesh` of one that it cannot be used with.
    """
    if isinstance(index, Index):
        if index.place.mesh is not None:
            check_context()
        return index
    remedy = "ja.build_index(method, checkpoints, train) makes one."
    if isinstance(index, str) or hasattr(index, "__fspath__"):
        remedy = "Open what is at a path: ja.open_index(path, method, checkpoints)."
    raise TypeError(f"index must be an Index, got {brief(repr(index), 60)}. {remedy}")


def self_contributions(rows: np.ndarray) -> np.ndarray:
    """Contributions of examples to their own scores, per group; in float64, which holds them.

    Args:
      rows: of the array `self`, [..., c, m + 2].

    Returns:
      Float64 [..., m], summed over checkpoints.
    """
    exponents = rows[..., SELF_COLUMNS.exponent, None].astype(np.int64)
    parts = np.ldexp(rows[..., : SELF_COLUMNS.exponent].astype(np.float64), exponents)
    return parts.sum(axis=-2)


def report_non_finite(positions: np.ndarray, total: int, what: str, where: str = "") -> None:
    """Warns of examples that were left out, if there are any.

    Args:
      positions: theirs.
      total: number of examples.
      what: they are.
      where: more about them.
    """
    if len(positions):
        warnings.warn(
            f"{len(positions)} of {total} {what} have outputs or gradients that are not finite, or "
            f"too large for their squares to be summed, and were left out{where}: ids "
            f"{first_ids(positions)}. Look at them: is a label out of range, or a mask zero "
            "everywhere?",
            NonFiniteWarning,
            stacklevel=3,
        )


def first_ids(ids: np.ndarray) -> str:
    """Returns the first ids, for a message."""
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
