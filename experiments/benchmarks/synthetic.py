"""Indexes of synthetic features, of any size: a model that is linear in what it is given."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxattr as ja

_STRIPE = 1024


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Rows of features that are drawn when they are read; looks like an array [n, p].

    Every 100 consecutive rows lean towards a direction of their own, and groups differ in their
    noise, so that there is something to find.

    Attributes:
      n: rows.
      p: columns.
      seed: of the numbers.
    """

    n: int
    p: int
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """[n, p]."""
        return (self.n, self.p)

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Draws some rows."""
        rows = np.atleast_1d(rows)
        found = np.empty((len(rows), self.p), np.float32)
        for stripe in np.unique(rows // _STRIPE):
            chosen = rows // _STRIPE == stripe
            generator = np.random.default_rng((self.seed, int(stripe)))
            drawn = generator.standard_normal((_STRIPE, self.p), np.float32)
            found[chosen] = drawn[rows[chosen] % _STRIPE]
        leaning = np.random.default_rng(7).standard_normal((64, self.p), np.float32)
        return found + 0.5 * leaning[(rows // 100) % 64]


def params(p: int, groups: int) -> dict[str, jax.Array]:
    """Parameters of a linear model, in groups of growing noise.

    Args:
      p: features, a multiple of the groups.
      groups: m.
    """
    return {f"group{i:04}": jnp.zeros(p // groups) for i in range(groups)}


def method(p: int, groups: int) -> Any:
    """TracIn of a linear model: its features are the rows themselves, scaled by group.

    Args:
      p: features.
      groups: m.
    """
    scales = np.geomspace(0.3, 3, groups)

    def output(params: Any, example: Any, key: jax.Array) -> jax.Array:
        del key
        parts = jnp.split(example["x"], groups)
        each = zip(params.values(), parts, scales, strict=True)
        return sum((scale * leaf @ part for leaf, part, scale in each), jnp.zeros(()))

    return ja.tracin(output, projection=ja.projections.identity())


def index(n: int, p: int, groups: int, **options: Any) -> Any:
    """Builds an index of synthetic features.

    Args:
      n: training examples.
      p: features.
      groups: m.
      **options: of `build_index`.
    """
    settings: dict[str, Any] = {"groups": ja.by_leaf, "batch_size": 2048} | options
    return ja.build_index(method(p, groups), params(p, groups), {"x": Synthetic(n, p)}, **settings)


def queries(q: int, p: int) -> dict[str, np.ndarray]:
    """Queries that lean as training examples do.

    Args:
      q: number of queries.
      p: features.
    """
    return {"x": Synthetic(100 * q, p, seed=1)[np.arange(q) * 100]}
