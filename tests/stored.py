"""Indexes on disk that several tests build, and sources that fail."""

import jax

import jaxattr as ja
from jaxattr.features import projections
from tests import models

SIZE, BATCH = 53, 8


TRAIN, QUERIES = models.data(SIZE), models.data(6, seed=1)


CHECKPOINTS = [models.mlp_params(jax.random.key(i)) for i in range(2)]


IDENTITY = ja.tracin(models.loss, projection=projections.identity())


TRAK = ja.trak(models.margin, projection=projections.rademacher(10))


def build(path, method=IDENTITY, checkpoints=CHECKPOINTS, train=TRAIN, **options):
    return ja.build_index(
        method, checkpoints, train, **{"batch_size": BATCH, "path": path} | options
    )


class Stops(Exception):
    pass


class Interrupted:
    """A source that fails at some example, and says what was read."""

    def __init__(self, stop=None, size=SIZE):
        self.arrays, self.stop, self.read = models.data(size), stop, []

    def __len__(self):
        return len(self.arrays["y"])

    def __getitem__(self, index):
        self.read.append(index)
        if self.stop is not None and self.stop <= index < SIZE - 1:
            raise Stops
        return jax.tree.map(lambda x: x[index], self.arrays)
