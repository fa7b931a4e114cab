"""The steps of an index as programs: whether they lower for a TPU, and what moves between chips."""

import collections
import re
from typing import Any

import jax
import numpy as np

import jaxattr as ja
from jaxattr.features.bases import NOTHING
from jaxattr.fitting import passes
from jaxattr.scores import ranking, weighting
from jaxattr.store.rows import SLAB

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def steps(index: ja.Index, rows: Any, queries: Any) -> dict[str, dict[str, int]]:
    """Lowers the feature step and the scoring step of an index for TPU, and counts collectives.

    Args:
      index: the index, on a mesh of all devices.
      rows: rows, of which the first block is taken.
      queries: rows.

    Returns:
      {step: {kind of collective: how many are in the compiled program, "bytes for TPU": of the
      lowered one}}; on the first host alone.
    """
    place, featurizer = index.place, index.featurizer
    assert featurizer is not None
    fitted = index.fitted[0] if index.fitted else NOTHING
    drawn = featurizer.draw(0, fitted, place)
    block = np.arange(index.rows.layout.block)
    batch = place.batch(lambda ids: {name: column[ids] for name, column in rows.items()}, block)
    ids = place.batch(lambda ids: ids, block)
    features = featurizer.key, index.checkpoints[0], batch, ids, drawn, fitted

    found = ja.query_features(index, queries).features
    w, phi, exponent = place.whole((weighting.weights_for(index, None), found, index.exponent))
    slab = next(iter(index.rows.slabs(index.rows.layout.side, SLAB)))
    weighted = ranking.weigh_step(place, index.layout)(w, phi, exponent)
    return {
        "feature step": _counted(passes._compiled_features(place, featurizer.step), features),
        "scoring step": _counted(ranking.score_step(place, index.link), (weighted, slab.arrays)),
    }


def _counted(step: Any, arguments: tuple[Any, ...]) -> dict[str, int]:
    if jax.process_index() > 0:  # it is the same program everywhere
        return {}
    exported = jax.export.export(step, platforms=["tpu"])(*arguments)
    text = step.lower(*arguments).compile().as_text()
    found = collections.Counter(re.findall(rf" ({KINDS})(?:-start)?\(", text))
    return dict(found) | {"bytes for TPU": len(exported.mlir_module_serialized)}
