"""Whether the training data are those that an index was made from, example by example.

While a block is read, 64 bits of each array of each of its examples are kept beside its rows; that
takes no pass of its own. Whoever brings data to an index that is there has them compared.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr import identity
from jaxattr.features.bases import Fitted
from jaxattr.fitting.passes import row_digests
from jaxattr.index.index import first_ids
from jaxattr.leaves import leaf_names
from jaxattr.sources import Source, track
from jaxattr.store.folder import StoreError
from jaxattr.store.rows import DIGESTS, Rows

Verify = Literal["all", "sample"]

# Examples that "sample" looks at.
_SAMPLES = 64


def how_much(verify: Verify | None, source: Source) -> Verify:
    """Returns how much of the data is compared, by default all of it if it is in memory.

    Args:
      verify: what the user passed.
      source: the data.
    """
    return verify or ("sample" if source.arrays is None else "all")


def data_differences(source: Source, rows: Rows, known: int, verify: Verify) -> list[str]:
    """Compares the first examples of a data set with those that an index was made from.

    Args:
      source: the data.
      rows: of the index.
      known: how many examples the index has digests of, the first ones.
      verify: "all" of them, or a "sample" of 64, evenly spread.

    Returns:
      A line for each array of the examples that differs, with how many do and which.
    """
    if not known:
        return []
    there = rows.column(DIGESTS, 0)[:known]
    positions = np.arange(known)
    if verify == "sample":
        positions = np.unique(np.linspace(0, known - 1, min(known, _SAMPLES)).round().astype(int))
    place, chosen = rows.place, source.part(positions)
    size, step = chosen.block_size(rows.layout.block, place), row_digests(place)
    blocks = track(chosen.blocks(size, place), "comparing the data", -(-chosen.size // size))
    here = np.concatenate([place.host(step(each.batch))[: each.real] for each in blocks])
    wrong = (here != there[positions]).reshape(len(positions), -1, identity.LANES).any(axis=-1)
    names = leaf_names(source.example)
    checked = "" if verify == "all" else f" of the {len(positions)} that were looked at"
    return [
        f"train: {name} of {column.sum()} examples{checked} differs from what the index was built "
        f"with, first: {first_ids(positions[column])}"
        for name, column in zip(names, wrong.T, strict=True)
        if column.any()
    ]


def check_rereading(rows: Rows) -> None:
    """Raises if the data were not the same each time they were read.

    Args:
      rows: of the index, all written.
    """
    first = rows.column(DIGESTS, 0)
    for number in range(1, rows.layout.checkpoints):
        wrong = np.flatnonzero((rows.column(DIGESTS, number) != first).any(axis=1))
        if len(wrong):
            raise StoreError(
                f"train gave other examples when it was read again, for checkpoint {number}: "
                f"{len(wrong)} of them, first: {first_ids(wrong)}. A source must return the same "
                "example whenever it is asked for it: no shuffling, no random augmentation."
            )


def check_fitted(rows: Rows, fitted: Fitted, number: int) -> None:
    """Raises if a basis was fitted to other data than the features were computed from.

    Args:
      rows: of the index, whose digests are written.
      fitted: what was fitted to the checkpoint.
      number: of the checkpoint.
    """
    if fitted.data is None or DIGESTS not in rows.layout.widths:
        return
    digests = jnp.asarray(rows.column(DIGESTS, number))
    ids = jnp.arange(len(digests))
    found = _sum_of_rows(digests, ids, jnp.ones(len(digests), bool))
    if not np.array_equal(found, fitted.data):
        raise StoreError(
            f"The basis of checkpoint {number} was fitted to other data than its features are "
            "computed from: train has changed since this index was begun, or gives other examples "
            "each time that it is read (shuffling, random augmentation), which it must not. Delete "
            "the index and build it again."
        )


_sum_of_rows = jax.jit(identity.sum_of_rows)
