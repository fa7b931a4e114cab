"""FactGraSS: some inputs and outputs of each linear map, whose products become fewer features."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import whole_number
from jaxattr.features import signs
from jaxattr.features.bases import Basis, Factored, Sides
from jaxattr.features.random_maps import added_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masks(Basis):
    """See `projections.factgrass`: some inputs and outputs, whose products are added up.

    Attributes:
      mask: times `rank` inputs and outputs are kept.
    """

    mask: int = 2
    references: ClassVar[tuple[str, ...]] = ("grass",)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("mask", self.mask)

    @property
    def name(self) -> str:
        """See `Basis`."""
        return f"FactGraSS, mask {self.mask}"

    def inner(self, size: int) -> int:
        """See `Basis`."""
        return size if self.rank is None else min(size, self.mask * self.rank)

    def draw(self, seed: bytes, factored: Sequence[Factored]) -> dict[str, Sides]:
        """See `Basis`: columns of the identity."""

        def side(of: Factored, number: int, size: int) -> Any:
            count = of.inner[number]
            if count == size:
                return None
            matrix = np.zeros((math.prod(of.lead), size, count), of.dtype)
            for layer, columns in enumerate(matrix):
                name = f"{of.map.leaf}\0{layer}\0mask{number}"
                ids, scales = signs.coordinates(seed, name, size, count)
                columns[ids, np.arange(count)] = scales
            return matrix.reshape(*of.lead, size, count)

        return {
            of.map.leaf: (side(of, 0, of.rows), side(of, 1, of.map.size_out)) for of in factored
        }

    def draw_mixing(self, seed: bytes, factored: Sequence[Factored]) -> Any:
        """See `Basis`: the features that products are added to, and their signs."""
        drawn = {}
        for of in factored:
            count, width, layers = math.prod(of.inner), of.left * of.right, math.prod(of.lead)
            if count > width:
                name = f"{of.map.leaf}\0hash"
                buckets, drawn_signs = signs.hashed(seed, name, layers * count, width)
                own = np.repeat(np.arange(layers, dtype=np.int32) * width, count)
                drawn[of.map.leaf] = buckets + own, drawn_signs
        return drawn

    def mix(
        self, drawn: Any, factored: Sequence[Factored], z: Mapping[str, jax.Array]
    ) -> Mapping[str, jax.Array]:
        """See `Basis`."""
        mixed = dict(z)
        for of in factored:
            if of.map.leaf in drawn:
                buckets, drawn_signs = drawn[of.map.leaf]
                x = z[of.map.leaf]
                x = x.reshape(x.shape[0], -1) * jnp.asarray(drawn_signs, x.dtype)[None]
                shape = *of.lead, of.left, of.right
                mixed[of.map.leaf] = added_up(x, buckets, math.prod(shape)).reshape(-1, *shape)
        return mixed
