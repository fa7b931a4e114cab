"""How right each parameter group is by itself."""

from typing import Any

import numpy as np

from jaxattr.evaluation.lds import LDS, lds_of_predictions
from jaxattr.index.index import Index
from jaxattr.scores.subsets import subset_contributions, subset_products


def group_lds(
    index: Index, queries: Any, masks: Any, outputs: Any, *, resamples: int = 1000
) -> dict[str, LDS]:
    """LDS of each parameter group's contributions alone: the heterogeneity that weights exploit.

    Args:
      index: the index.
      queries: as in `score`.
      masks: bool [s, n].
      outputs: float [s, q], as in `lds`.
      resamples: of the subsets, as there; 1 where only means matter.

    Returns:
      {group name: LDS}.

    References:
      Li et al. (2025), arXiv:2506.05647, section 2.
    """
    if index.link == "square":
        sums = np.einsum("qsmm->qsm", subset_products(index, queries, masks))
    else:
        sums = subset_contributions(index, queries, masks)
    return {
        name: lds_of_predictions(sums[:, :, j], outputs, resamples=resamples)
        for j, name in enumerate(index.layout.names)
    }
