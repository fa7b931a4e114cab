"""Models trained on subsets, kept on disk, and how well weighted scores predict them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import jaxattr as ja
from jaxattr import evaluation, files
from jaxattr.evaluation import LDS, Difference
from jaxattr.evaluation.retraining import TrainFn
from jaxattr.index.queries import QueryFeatures
from jaxattr.typing import OutputFn
from jaxattr.weights.report import WeightFit


class Truth(NamedTuple):
    """What retrained models say.

    Attributes:
      masks: bool [subsets, n].
      learning: outputs on the learning queries, [subsets, q].
      evaluation: outputs on the evaluation queries, [subsets, q].
    """

    masks: np.ndarray
    learning: np.ndarray
    evaluation: np.ndarray


def load_or_make(path: Path, make: Callable[[], Truth]) -> Truth:
    """Reads what was made before; else makes it, and writes it whole or not at all.

    Args:
      path: of an .npz file.
      make: the work.

    Returns:
      The ground truth.
    """
    if path.exists():
        stored = np.load(path)
        return Truth(*(stored[field] for field in Truth._fields))
    truth = make()
    with files.written_whole(path) as partial:
        np.savez(partial, **truth._asdict())
    return truth


def retrained(
    train_fn: TrainFn,
    masks: np.ndarray,
    key: jax.Array,
    output: OutputFn,
    learning: dict[str, Any],
    queries: dict[str, Any],
    *,
    seeds: int,
    at_once: int,
) -> Truth:
    """Trains on subsets, on all devices.

    Args:
      train_fn: as in `ja.retrain`, as all that follow.
      masks: see there.
      key: see there.
      output: (params, example, key) -> scalar; larger = more of it.
      learning: queries to learn weights from.
      queries: queries to measure on.
      seeds: see there.
      at_once: see there.

    Returns:
      The ground truth.
    """
    params = ja.retrain(train_fn, masks, key, seeds=seeds, at_once=at_once, mesh=mesh_of_devices())
    both = {name: np.concatenate([learning[name], queries[name]]) for name in learning}
    outputs = np.asarray(evaluation.outputs(output, params, both))
    return Truth(masks, *np.split(outputs, 2, axis=1))


class Comparison(NamedTuple):
    """What weights do to the LDS of one method.

    Attributes:
      weights: {name of weights: {group: weight}}.
      lds: {name of weights: LDS on the evaluation queries}.
      difference: learned minus uniform.
      fit: what learning reported.
    """

    weights: dict[str, dict[str, float]]
    lds: dict[str, LDS]
    difference: Difference
    fit: WeightFit


def compare(
    index: ja.Index,
    learning: QueryFeatures,
    queries: QueryFeatures,
    truth: Truth,
    *,
    outcomes: ja.Outcomes | None = None,
    copies: tuple[Any, Any] | None = None,
    more: Mapping[str, dict[str, float]] | None = None,
    most: int | None = None,
) -> Comparison:
    """Learns weights, and measures them beside those that learn nothing, or from ground truth.

    Args:
      index: of the method.
      learning: features of the queries to learn from.
      queries: features of those to measure on.
      truth: outputs of retrained models on both.
      outcomes: of small retrained models on the queries to learn from, if weights are to be learned
        from those.
      copies: noised training examples, as in `ja.learn_weights`.
      more: other weights to measure.
      most: subsets that the weights of ground truth are fitted to. Default: all. Of squared scores
        the fit has a matrix of all pairs of groups for each subset and query.

    Returns:
      The figures; those of ground truth come last.
    """
    fit = ja.learn_weights(index, learning, outcomes=outcomes, copies=copies)
    fitted_to_truth = ja.learn_weights(
        index, learning, outcomes=ja.Outcomes(truth.masks[:most], truth.learning[:most])
    )
    weights = {
        "uniform": dict.fromkeys(index.layout.names, 1.0),
        **(more or {}),
        "learned": fit.weights,
        "fitted to truth": fitted_to_truth.weights,
    }
    lds = dict(lds_of_weights(index, queries, truth, weights))
    difference = evaluation.paired_difference(lds["learned"], lds["uniform"])
    return Comparison(weights, lds, difference, fit)


def unit_rms_weights(index: ja.Index, queries: Any) -> dict[str, float]:
    """Weights that scale every group's contributions to the same root mean square.

    Args:
      index: the index.
      queries: to learn from, or their features.
    """
    parts = np.asarray(ja.contributions(index, queries), np.float64)
    rms = np.sqrt(np.nanmean(parts**2, axis=(0, 1)))
    scale = np.divide(1, rms, out=np.zeros_like(rms), where=rms > 0)
    return dict(zip(index.layout.names, (scale / scale.mean()).tolist(), strict=True))


def lds_of_weights(
    index: ja.Index, queries: Any, truth: Truth, weights: dict[str, dict[str, float]]
) -> Iterator[tuple[str, LDS]]:
    """LDS for several weights at the cost of one.

    Args:
      index: the index.
      queries: the evaluation queries, or their features.
      truth: outputs of retrained models.
      weights: {name: weights}.

    Yields:
      Name and LDS.
    """
    if index.link == "square":
        for name, w in weights.items():
            yield name, ja.lds(ja.score(index, queries, weights=w), truth.masks, truth.evaluation)
        return
    sums = evaluation.subset_contributions(index, queries, truth.masks)  # [q, s, m]
    for name, w in weights.items():
        array = np.array([w[group] for group in index.layout.names])
        yield name, evaluation.lds_of_predictions(sums @ array, truth.evaluation)


def minus(loss: OutputFn) -> OutputFn:
    """What models of subsets are asked: minus a loss, larger = better."""

    def output(params: Any, example: Any, key: jax.Array) -> jax.Array:
        return -loss(params, example, key)

    return output


def mesh_of_devices() -> Mesh | None:
    """A mesh of all devices, or None if there is one."""
    if jax.device_count() == 1:
        return None
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
