"""What retrained models did on the queries that weights are learned from."""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.identity import Contents
from jaxattr.index.queries import QueryFeatures
from jaxattr.scales import widened
from jaxattr.scores.subsets import checked_masks, summed

# Fewer models cannot be split into some to fit to and some to check on.
FEWEST_MODELS = 8
# Halves that scores are summed over, where they stand in for models.
_HALVES = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """Outputs of models that were trained on subsets of the training set.

    One set serves every method, index and grouping of a model. `ja.outcomes` makes them; those of
    models that were trained elsewhere do as well.

    Attributes:
      masks: bool [s, n], which training examples each model was trained on.
      outputs: float [s, q], what it does on each learning query; larger = more of what scores
        attribute: a margin, or minus a loss.
      queries: digest of the learning queries, where it is known.
      reference: what the real model does on them, where it is known, [q]; of several checkpoints
        the mean.

    Raises:
      ValueError: if shapes do not match, there are fewer than 8 models, or the subsets are all the
        same, such as all of the training set.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> outcomes = Outcomes(rng.random((16, 40)) < 0.25, rng.normal(size=(16, 5)))
      >>> print(outcomes)
      16 models on 9 of 40 training examples each, asked 5 queries
    """

    masks: Any
    outputs: Any
    queries: str | None = None
    reference: np.ndarray | None = None

    def __post_init__(self) -> None:
        masks, outputs = checked_masks(self.masks), widened(self.outputs)
        if outputs.ndim != 2 or len(outputs) != len(masks) or outputs.dtype.kind not in "fiu":
            raise ValueError(
                f"outputs must be real numbers [models, queries], a row for each of the "
                f"{len(masks)} rows of masks; got {outputs.dtype} {list(outputs.shape)}."
            )
        if len(masks) < FEWEST_MODELS:
            raise ValueError(
                f"Weights need outcomes of at least {FEWEST_MODELS} models, got {len(masks)}; 64 "
                "are usual, and 16 often enough: ja.outcomes(..., models=64)."
            )
        if not _varies(masks).any():
            whole = " The masks are all True." if masks.all() else ""
            raise ValueError(
                "The subsets are all the same, so that outputs say nothing of single training "
                f"examples.{whole} Draw them with ja.evaluation.random_subsets(key, n, count, "
                "fraction=0.25), and train a model on each."
            )
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "outputs", outputs.astype(np.float64))

    def __str__(self) -> str:
        (s, n), q = self.masks.shape, self.outputs.shape[1]
        size = self.masks.sum(axis=1).mean()
        text = f"{s} models on {size:.0f} of {n} training examples each, asked {q} queries"
        finite = np.isfinite(self.outputs).all(axis=1)
        if not finite.all():
            text += f"; {(~finite).sum()} of them not finite"
        if self.reference is None or not finite.any():
            return text
        mean = self.outputs[finite].mean()
        return (
            f"{text}; their mean output is {mean:.3g}, the real model's {self.reference.mean():.3g}"
        )


def outcomes_of_scores(scores: Any, n: int) -> Outcomes:
    """What scores say that models of random halves do: sums over each, without noise.

    Args:
      scores: float [q, n], such as those of `ja.unroll`.
      n: number of training examples of the index.

    Returns:
      Outcomes, the same for the same scores; NaN for a query whose scores are not all finite, which
      is then skipped and counted.

    Raises:
      ValueError: if scores are of another number of examples, or no numbers.
    """
    scores = widened(scores)
    if scores.ndim != 2 or scores.shape[1] != n or scores.dtype.kind not in "fiu":
        raise ValueError(
            f"reference must be scores [q, n] with n = {n}, the training examples of the index; "
            f"got {scores.dtype} {list(scores.shape)}."
        )
    finite = np.isfinite(scores).all(axis=1, keepdims=True)
    scores = np.where(finite, scores, np.nan).astype(np.float64)
    order = np.random.default_rng(0).random((_HALVES, n)).argsort(axis=1)
    masks = order < n // 2
    return Outcomes(masks, summed(scores, masks).T)


def check_queries(outcomes: Outcomes, queries: Any, count: int) -> None:
    """Checks that outcomes are of these queries, as far as those are known.

    Args:
      outcomes: of retrained models.
      queries: arrays, a source or features.
      count: how many they are.

    Raises:
      ValueError: if they are of others.
    """
    q = outcomes.outputs.shape[1]
    if q != count:
        raise ValueError(
            f"Outcomes are of {q} queries, and there are {count}: pass the queries that the "
            "retrained models were asked, in their order."
        )
    found = digest_of_queries(queries)
    if None not in (found, outcomes.queries) and found != outcomes.queries:
        raise ValueError(
            f"Outcomes are of {q} other queries than those that are given, "
            "though as many: pass the queries that ja.outcomes was given, in their order."
        )


def finite_models(outputs: np.ndarray) -> np.ndarray:
    """Which models are finite on all queries that are `known`, bool [s].

    Args:
      outputs: of the models, [s, q].
    """
    finite = np.isfinite(outputs)
    return finite.any(axis=1) & finite[:, known(outputs)].all(axis=1)


def known(outputs: np.ndarray) -> np.ndarray:
    """Which queries most models are finite on, of those that are finite on any, bool [q].

    Args:
      outputs: of the models, [s, q].
    """
    finite = np.isfinite(outputs)
    return 2 * finite.sum(axis=0) > finite.any(axis=1).sum()


def digest_of_queries(queries: Any) -> str | None:
    """A digest of a pytree of arrays, or None for a source that is read on demand.

    Args:
      queries: the queries.
    """
    return Contents(queries).digest if _are_arrays(queries) else None


def digests_of_queries(queries: Any) -> list[bytes]:
    """A digest of each query of a pytree of arrays; none for a source that is read on demand.

    Args:
      queries: the queries.
    """
    if not _are_arrays(queries):
        return []
    leaves = [_bits(leaf) for leaf in jax.tree.leaves(queries)]
    rows = (b"".join(leaf[i].tobytes() for leaf in leaves) for i in range(len(leaves[0])))
    return [hashlib.sha256(row).digest() for row in rows]


def _bits(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    value = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    # As JAX would take it, so that a query is the same on the host and on a device.
    return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)


def _are_arrays(queries: Any) -> bool:
    leaves = jax.tree.leaves(queries)
    return not isinstance(queries, QueryFeatures) and all(
        hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves
    )


class Agreed(NamedTuple):
    """Outcomes as weights are fitted to them.

    Attributes:
      masks: of the models that are finite, bool [s, n].
      ranks: of each model's output among the models, centred, of unit variance; zero for a query
        that says nothing, [s, q].
      dropped: models that are not finite on all queries that others are finite on.
      skipped: queries on which no model is finite, or all do the same.
    """

    masks: np.ndarray
    ranks: np.ndarray
    dropped: int
    skipped: int


def agreed(outcomes: Outcomes, queries: np.ndarray) -> Agreed:
    """Drops what is not finite, and ranks the rest.

    Args:
      outcomes: as the user has them.
      queries: positions of the queries that are wanted.

    Returns:
      Ranks.

    Raises:
      ValueError: if fewer than 8 models are finite, or no query says anything.
    """
    from scipy import stats  # slow to import, and needed here alone

    outputs = outcomes.outputs[:, queries]
    asked, kept = known(outputs), finite_models(outputs)
    if not asked.any():
        raise ValueError(
            f"The outputs of most of the {len(kept)} models are not finite on any of the "
            f"{len(asked)} queries: training diverged. Lower its learning rate."
        )
    if kept.sum() < FEWEST_MODELS:
        raise ValueError(
            f"Only {kept.sum()} of the {len(kept)} models have finite outputs on all queries, and "
            f"{FEWEST_MODELS} are needed: training diverged for models "
            f"{np.flatnonzero(~kept)[:10].tolist()}. Lower its learning rate."
        )
    ranks = np.zeros((int(kept.sum()), outputs.shape[1]))
    ranks[:, asked] = stats.rankdata(outputs[kept][:, asked], axis=0)
    ranks = ranks - ranks.mean(axis=0)
    deviation = ranks.std(axis=0)
    if not deviation.any():
        raise ValueError(
            f"All {len(ranks)} models have the same output on each of the {len(asked)} queries: "
            "the output must depend on the parameters, and training on the examples."
        )
    ranks = ranks / np.where(deviation > 0, deviation, 1)
    return Agreed(outcomes.masks[kept], ranks, int((~kept).sum()), int((deviation == 0).sum()))


def variance_of_sums(masks: np.ndarray, count: int) -> float:
    """Variance over random subsets of a sum, for centred values of which `count` have square sum 1.

    Subsets of the sizes at hand, drawn from the examples that are in some masks and not in all.

    Args:
      masks: bool [s, n].
      count: number of values.
    """
    varying = _varies(masks)
    size, pool = masks[:, varying].sum(axis=1).mean(), int(varying.sum())
    return float(size * (pool - size) / max(pool - 1, 1) / max(count, 1))


def _varies(masks: np.ndarray) -> np.ndarray:
    some, every = masks.any(axis=0), masks.all(axis=0)
    return np.asarray(some & ~every)
