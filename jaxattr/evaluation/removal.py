"""Removal: how much worse is a model at a query without the examples that scores name?"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxattr import markup
from jaxattr.batches import leading_size
from jaxattr.counts import whole_number
from jaxattr.evaluation.lds import finite_mean
from jaxattr.evaluation.retraining import TrainFn, asking, check_number, random_subsets, trained
from jaxattr.evaluation.retrieval import strongest
from jaxattr.inputs.outputs import check_function
from jaxattr.keys import check_key
from jaxattr.scales import widened
from jaxattr.typing import Batch, Key, OutputFn

_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fall:
    """How far outputs fall when each query loses its own examples, beyond random ones.

    Attributes:
      count: examples removed for each query.
      mean: over queries; positive: what was removed helped.
      low: 2.5 % quantile of the mean over resampled queries and random draws.
      high: 97.5 % quantile.
      per_query: the mean output without random examples, minus that without the query's own; NaN
        where skipped, [q].
      flips: share of the queries with a positive output without random examples that have none
        without their own: brittleness, if the output is a margin. NaN if no output is positive.
      random_flips: the same share without random examples, by single draws.
      skipped: queries that have an output which is not finite.
      outputs: without the query's own examples, [q].
      random: without random examples, the same for every method, [draws, q].
    """

    count: int
    mean: float
    low: float
    high: float
    per_query: np.ndarray
    flips: float
    random_flips: float
    skipped: int
    outputs: np.ndarray
    random: np.ndarray

    def __str__(self) -> str:
        text = f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"
        return text + (f" ({self.skipped} queries skipped)" if self.skipped else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
    """What the removal of proponents and of opponents does, for each fraction.

    Attributes:
      fractions: of the training set, that were removed.
      proponents: without the strongest proponents, for each fraction: outputs should fall.
      opponents: without the strongest opponents: outputs should rise, and the mean be negative.
        Empty if they were not asked for.
    """

    fractions: tuple[float, ...]
    proponents: tuple[Fall, ...]
    opponents: tuple[Fall, ...]

    def __str__(self) -> str:
        lines = [
            f"without {removed}: proponents {fall}{flips}"
            + (f"; opponents {other}" if other else "")
            for removed, fall, flips, other in self._rows(", {} flip")
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: a row for each fraction."""
        headings = ("removed", "without proponents", "flips", "without opponents")
        caption = "Fall of the outputs, beyond that of random removal"
        return markup.table(headings, self._rows("{}"), caption)

    def _rows(self, flips: str) -> list[tuple[str, Fall, str, Fall | str]]:
        opponents: Sequence[Fall | str] = self.opponents or [""] * len(self.fractions)
        return [
            (
                f"{100 * fraction:g} % ({fall.count})",
                fall,
                "" if np.isnan(fall.flips) else flips.format(f"{100 * fall.flips:.0f} %"),
                other,
            )
            for fraction, fall, other in zip(
                self.fractions, self.proponents, opponents, strict=True
            )
        ]


def removal(
    train_fn: TrainFn,
    output_fn: OutputFn,
    scores: Any,
    queries: Batch,
    key: Key,
    *,
    fractions: Sequence[float] = (0.01, 0.05),
    random: int = 16,
    seeds: int = 1,
    opponents: bool = True,
    at_once: int | None = None,
    mesh: Mesh | None = None,
) -> Removal:
    """Retrains without each query's strongest examples, and measures how far its output falls.

    With minus a loss as output, the fall is the query loss difference (QLD): the rise of the
    query's loss. With a margin, `flips` is brittleness: how many predictions turn. Outputs are
    compared with those of models without as many random examples, so that it does not matter that
    a model has less data.

    With the same key, two methods are compared on the same random draws and from the same seeds, so
    that their difference is known better than each: `mean_interval(first.proponents[0].per_query -
    second.proponents[0].per_query)`.

    Args:
      train_fn: (key, ids int [s]) -> params, pure, as in `ja.retrain`; `ja.trainer` makes one.
      output_fn: (params, example, key) -> scalar; larger = more of what scores attribute: minus a
        loss, or a margin.
      scores: float [q, n], larger = stronger proponent. The most negative are the opponents; where
        there are fewer, as of squares, the smallest.
      queries: a pytree of arrays [q, ...].
      key: PRNG key.
      fractions: of the training set, to remove.
      random: draws of random examples, for each fraction.
      seeds: models per subset, over which outputs are averaged; the same keys for all subsets.
      opponents: whether opponents are removed too, by models of their own.
      at_once: models in memory at once. Default: 16, or one per device.
      mesh: devices to spread the models over. Default: the default device.

    Returns:
      The falls, for each fraction. Their intervals are of these seeds, and too narrow with fewer
      than some 24 queries or draws.

    Raises:
      TypeError: if fractions are no sequence, or a count is no whole number.
      ValueError: if scores are not finite or not [q, n], a fraction removes nothing or all, or the
        train function ignores its ids or has another number of examples.

    Warns:
      UserWarning: if the train function ignores its key.

    Cost: (2 q + random) * seeds trainings for each fraction, on all examples but those removed, or
      (q + random) * seeds without opponents; each model is asked all queries.

    References:
      Ilyas et al. (2022), Datamodels, arXiv:2202.00622 (brittleness). Deviation: there outputs are
      compared with those of models of all examples.

    Example:
      >>> data = jax.numpy.arange(20.0)
      >>> def mean(key, ids):
      ...     return data[ids].mean() + 0 * jax.random.normal(key)
      >>> found = removal(mean, lambda params, example, key: params * example, data[None],
      ...                 np.ones(1), jax.random.key(0), fractions=[0.1])
      >>> found.proponents[0].count, float(found.proponents[0].outputs[0])
      (2, 8.5)
    """
    check_function(output_fn, "output_fn")
    seeds = whole_number("seeds", seeds)
    scores = _checked_scores(scores)
    q, n = scores.shape
    check_number(train_fn, n)
    subset_key, train_key, output_key = jax.random.split(check_key(key), 3)
    if np.ndim(fractions) != 1 or not len(fractions):
        raise TypeError(
            f"fractions must be a list, of one fraction [{fractions!r}], got {fractions!r}."
        )
    random = whole_number("random", random)
    drawn = [random_subsets(subset_key, n, random, fraction=each) for each in fractions]
    queries, ask = asking(train_fn, output_fn, queries, (train_key, output_key), n)
    if leading_size(queries) != q:
        raise ValueError(
            f"scores must be [q, n] of the {leading_size(queries)} queries, got {[q, n]}."
        )
    keys = jax.random.split(train_key, seeds)

    def outputs_without(removed: np.ndarray) -> np.ndarray:
        """Outputs of models on all queries, a model for each row of bool [m, n]: float [m, q]."""
        chunks = trained(
            train_fn, ~removed, keys, seeds=seeds, at_once=at_once, mesh=mesh, then=ask
        )
        found = np.concatenate([np.asarray(chunk, np.float64) for chunk in chunks])
        return found.reshape(len(removed), seeds, q).mean(axis=1)

    signs = (1, -1) if opponents else (1,)
    falls = [_falls(outputs_without, scores, signs, masks) for masks in drawn]
    return Removal(
        fractions=tuple(map(float, fractions)),
        proponents=tuple(each[0] for each in falls),
        opponents=tuple(each[1] for each in falls if opponents),
    )


def _falls(
    outputs_without: Callable[[np.ndarray], np.ndarray],
    scores: np.ndarray,
    signs: Sequence[int],
    drawn: np.ndarray,
) -> list[Fall]:
    """One for each sign of scores; all models of one size are trained together."""
    count = int(drawn[0].sum())
    own = np.zeros((len(signs), *scores.shape), bool)
    for masks, sign in zip(own, signs, strict=True):
        np.put_along_axis(masks, strongest(sign * scores, count), True, axis=1)
    found = outputs_without(np.concatenate([*own, drawn]))  # [signs * q + random, q]
    *parts, random = np.split(found, len(scores) * np.arange(1, len(signs) + 1))
    return [_fall(count, part.diagonal().copy(), random) for part in parts]


def _fall(count: int, outputs: np.ndarray, random: np.ndarray) -> Fall:
    usual = random.mean(axis=0)
    finite = np.isfinite(outputs) & np.isfinite(usual)
    per_query = np.where(finite, usual - outputs, np.nan)
    low = high = float("nan")
    if finite.any():
        resampled = _resampled(outputs[finite], random[:, finite])
        low, high = map(float, np.quantile(resampled, [0.025, 0.975]))
    positive = finite & (usual > 0)
    return Fall(
        count=count,
        mean=finite_mean(per_query),
        low=low,
        high=high,
        per_query=per_query,
        flips=finite_mean(np.where(positive, outputs <= 0, np.nan)),
        random_flips=finite_mean(np.where(positive, random <= 0, np.nan)),
        skipped=int((~finite).sum()),
        outputs=outputs,
        random=random,
    )


def _resampled(outputs: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Means over resampled queries and draws: all queries share the luck of the draws."""
    generator = np.random.default_rng(0)
    draws = generator.integers(len(random), size=(_RESAMPLES, len(random)))
    queries = generator.integers(len(outputs), size=(_RESAMPLES, len(outputs)))
    return np.array(
        [
            (random[rows].mean(axis=0) - outputs)[columns].mean()
            for rows, columns in zip(draws, queries, strict=True)
        ]
    )


def _checked_scores(scores: Any) -> np.ndarray:
    scores = widened(scores)
    if scores.ndim != 2 or not scores.size or scores.dtype.kind not in "iuf":
        raise ValueError(
            f"scores must be real numbers [q, n], got {scores.dtype} {list(scores.shape)}: those "
            "of ja.score(index, queries)."
        )
    scores = scores.astype(np.float64)
    lost = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(lost):
        raise ValueError(
            f"{len(lost)} queries have scores that are not finite, at positions "
            f"{lost[:10].tolist()}: leave them out, of the queries too."
        )
    return scores
