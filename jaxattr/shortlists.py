r"""Learning weights without the array of contributions [q, n, m].

One pass over the training set keeps, per query, the contributions of the strongest examples under
the present weights (the shortlist), the Gram matrix of all contributions, which gives the norm of
the scores for any weights, and bounds on the examples that were dropped. As the weights move, the
top k of the shortlist are those of all examples for as long as a certificate holds; where it no
longer does, another pass is due. Results are those of the whole array, up to rounding.

The certificate (heuristics decide only how often a pass is due, not what is found): with weights w
now, v at the pass, any a >= 0, and c_n the contributions of a dropped example,

.. math:: s_n(w) = a\, s_n(v) + c_n^\top (w - a v)
          \le a \max_\mathrm{dropped} s(v) + \max_\mathrm{dropped} \|c_n v\|_2 \,
          \|(w - a v) / v\|_2

(Bounding each group by itself never came to fewer passes; see BUILD_NOTES.md.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattr.plans import FeatureLayout
from jaxattr.ranking import SIDE, local_contributions, slab_ids, train_side
from jaxattr.rows import EXAMPLES
from jaxattr.sharding import DATA, Placement
from jaxattr.typing import Features


class Shortlist(NamedTuple):
    """What one pass over the training set leaves of the contributions of some queries.

    Attributes:
      ids: of the listed examples, [l, q, s]; -1 where there is none. One list holds the largest
        scores; a second, where it is wanted, the smallest.
      parts: their contributions, [l, q, s, m].
      scores: their signed scores under the weights of the pass, [l, q, s].
      lengths: the norms of their weighted contributions, [l, q, s].
      dropped: the largest signed score of the others, or a bound on it, [l, q]; -inf if there are
        no others.
      radius: the largest norm of the others' weighted contributions, [l, q].
      gram: sum of c_n c_n^T over all examples, [q, m, m]; None if every example is listed.
      squares: sum of squared contributions over all examples, [q, m].
      largest: largest absolute contribution, [q, m].
      weights: w of the pass, [m].
    """

    ids: jax.Array
    parts: jax.Array
    scores: jax.Array
    lengths: jax.Array
    dropped: jax.Array
    radius: jax.Array
    gram: jax.Array | None
    squares: jax.Array
    largest: jax.Array
    weights: jax.Array

    @property
    def complete(self) -> bool:
        """Whether every example is listed."""
        return self.gram is None

    def rows(self, positions: jax.Array) -> "Shortlist":
        """Those of some queries."""
        lists = {
            name: getattr(self, name)[:, positions]
            for name in ("ids", "parts", "scores", "lengths", "dropped", "radius")
        }
        gram = None if self.gram is None else self.gram[positions]
        squares, largest = self.squares[positions], self.largest[positions]
        return self._replace(**lists, gram=gram, squares=squares, largest=largest)


def everything(contributions: jax.Array, w: jax.Array) -> Shortlist:
    """A list of all examples.

    Args:
      contributions: [q, n, m].
      w: weights [m].

    Returns:
      One list, that drops none.
    """
    q, n, _ = contributions.shape
    scores = jnp.matmul(contributions, w.astype(contributions.dtype), precision="highest")
    nothing = jnp.zeros((1, q), scores.dtype)
    return Shortlist(
        ids=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, None], (1, q, n)),
        parts=contributions[None],
        scores=scores[None],
        lengths=jnp.zeros((1, q, 0), scores.dtype),
        dropped=nothing - jnp.inf,
        radius=nothing,
        gram=None,
        squares=jnp.sum(contributions**2, axis=1),
        largest=jnp.abs(contributions).max(axis=1),
        weights=w,
    )


def signed_scores(listed: Shortlist, w: jax.Array, signs: tuple[int, ...]) -> jax.Array:
    """Scores of the listed examples, largest where they matter; linear in w.

    Args:
      listed: the shortlist.
      w: weights [m].
      signs: 1 for the largest scores, -1 for the smallest.

    Returns:
      [l, q, s], -inf where there is no example.
    """
    scores = jnp.matmul(listed.parts, w.astype(listed.parts.dtype), precision="highest")
    if listed.complete:  # one list, which serves for both ends
        return jnp.stack([sign * scores[0] for sign in signs])
    scores = scores * jnp.asarray(signs, scores.dtype)[:, None, None]
    return jnp.where(listed.ids >= 0, scores, -jnp.inf)


def sum_of_squares(listed: Shortlist, w: jax.Array) -> jax.Array:
    """Sum of squared scores over all examples, [q].

    Args:
      listed: the shortlist.
      w: weights [m].
    """
    if listed.gram is None:
        scores = jnp.matmul(listed.parts[0], w.astype(listed.parts.dtype), precision="highest")
        return jnp.sum(scores**2, axis=-1)
    w = w.astype(listed.gram.dtype)
    product = jnp.matmul(listed.gram, w, precision="highest")  # [q, m]
    return jnp.maximum(jnp.matmul(product, w, precision="highest"), 0)


def bounds(listed: Shortlist, w: jax.Array) -> jax.Array:
    """What no dropped example's signed score exceeds under other weights, [l, q].

    Args:
      listed: the shortlist.
      w: weights [m], not negative.
    """
    v = listed.weights
    ratio = jnp.where(v > 0, w / jnp.where(v > 0, v, 1), 1)
    a = ratio.mean()
    moved = jnp.linalg.norm(ratio - a)
    # A group that had no weight then and has some now is in no radius.
    moved = jnp.where(jnp.any((v == 0) & (w > 0)), jnp.inf, moved).astype(listed.radius.dtype)
    bound = a.astype(moved.dtype) * listed.dropped + listed.radius * moved
    return jnp.where(listed.dropped == -jnp.inf, -jnp.inf, bound)


@functools.lru_cache(maxsize=16)
def compiled_pass(
    place: Placement, layout: FeatureLayout, length: int, signs: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    """The steps of a pass.

    Args:
      place: the devices.
      layout: the groups.
      length: examples per list and device.
      signs: as in `signed_scores`.

    Returns:
      start: (w, phi [q, c * p]) -> an empty list per device;
      absorb: (list, phi, slab, first id, blocks seen before) -> list;
      merge: list -> one list, on every device.
    """
    own = (DATA,)  # every array of a list has a leading axis of devices
    absorbing = place.over_shards(
        functools.partial(_absorb, place, layout, signs), (own, (), SIDE, (), ()), own
    )
    merging = place.over_shards(functools.partial(_merge, place), (own,), ())

    def start(w: jax.Array, phi: Features) -> Shortlist:
        q, m, lists, shards = len(phi), len(layout.names), len(signs), place.shards
        dtype = jnp.promote_types(phi.dtype, jnp.float32)
        zeros = functools.partial(jnp.zeros, dtype=dtype)
        low = functools.partial(jnp.full, fill_value=-jnp.inf, dtype=dtype)
        return Shortlist(
            ids=jnp.full((shards, lists, q, length), -1, jnp.int32),
            parts=zeros((shards, lists, q, length, m)),
            scores=low((shards, lists, q, length)),
            lengths=zeros((shards, lists, q, length)),
            dropped=low((shards, lists, q)),
            radius=zeros((shards, lists, q)),
            gram=zeros((shards, q, m, m)),
            squares=zeros((shards, q, m)),
            largest=zeros((shards, q, m)),
            weights=jnp.broadcast_to(w.astype(dtype)[None], (shards, m)),
        )

    return jax.jit(start), jax.jit(absorbing, donate_argnums=0), jax.jit(merging)


def _absorb(
    place: Placement,
    layout: FeatureLayout,
    signs: tuple[int, ...],
    listed: Shortlist,
    phi: Features,
    arrays: dict[str, jax.Array],
    first: Any,
    skip: Any,
) -> Shortlist:
    """Takes a slab in; every array of the list has a leading axis of one device."""
    listed = jax.tree.map(lambda x: x[0], listed)
    g, b = arrays[EXAMPLES].shape[:2]
    fresh = jnp.repeat(jnp.arange(g) >= skip, b)
    counted = train_side(arrays).counted & fresh
    parts = local_contributions(place, layout, phi, arrays)  # [q, r, m]
    parts = jnp.where(counted[None, :, None], parts, 0).astype(listed.parts.dtype)
    weighted = parts * listed.weights[None, None]
    scores, lengths = weighted.sum(axis=-1), jnp.linalg.norm(weighted, axis=-1)  # [q, r]
    ids = jnp.where(counted, slab_ids(place, (g, b), first), -1).astype(listed.ids.dtype)
    ids = jnp.broadcast_to(ids[None], scores.shape)
    lists = []
    for number, sign in enumerate(signs):
        signed = jnp.where(counted[None], sign * scores, -jnp.inf)
        before = _Rows(*(getattr(listed, name)[number] for name in _Rows._fields))
        candidates, left = _strongest(_Rows(ids, parts, signed, lengths), before.ids.shape[1])
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, candidates)
        kept, evicted = _strongest(both, before.ids.shape[1])
        lists.append((kept, functools.reduce(jnp.maximum, (listed.radius[number], left, evicted))))
    kept, radius = jax.tree.map(lambda *each: jnp.stack(each), *lists)
    gram = jnp.einsum("qrm,qrk->qmk", parts, parts, precision="highest")
    assert listed.gram is not None
    new = listed._replace(
        **kept._asdict(),
        radius=radius,
        gram=listed.gram + gram,
        squares=listed.squares + jnp.einsum("qmm->qm", gram),
        largest=jnp.maximum(listed.largest, jnp.abs(parts).max(axis=1)),
    )
    return jax.tree.map(lambda x: x[None], new)


class _Rows(NamedTuple):
    """Examples per query, [q, r] and [q, r, m]."""

    ids: jax.Array
    parts: jax.Array
    scores: jax.Array
    lengths: jax.Array


def _strongest(rows: _Rows, length: int) -> tuple[_Rows, jax.Array]:
    """Those with the largest scores, at most so many; and the largest norm of the others, [q]."""
    if rows.ids.shape[1] <= length:
        return rows, jnp.zeros(len(rows.ids), rows.lengths.dtype)
    _, places = jax.lax.top_k(rows.scores, length)
    chosen = jax.tree.map(
        lambda x: jnp.take_along_axis(
            x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1
        ),
        rows,
    )
    others = rows.lengths.at[jnp.arange(len(places))[:, None], places].set(0)
    return chosen, others.max(axis=1)


def _merge(place: Placement, listed: Shortlist) -> Shortlist:
    """Joins the lists of all devices; sums and extremes over them."""
    listed = jax.tree.map(lambda x: x[0], listed)

    def joined(x: jax.Array) -> jax.Array:  # [shards, l, q, s, ...] -> [l, q, shards * s, ...]
        x = jnp.moveaxis(place.gather_shards(x), 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    # A full list's weakest example bounds what was dropped; a list with room dropped nothing.
    return Shortlist(
        ids=joined(listed.ids),
        parts=joined(listed.parts),
        scores=joined(listed.scores),
        lengths=joined(listed.lengths),
        dropped=place.largest_of_shards(listed.scores.min(axis=-1)),
        radius=place.largest_of_shards(listed.radius),
        gram=place.sum_shards(listed.gram),
        squares=place.sum_shards(listed.squares),
        largest=place.largest_of_shards(listed.largest),
        weights=listed.weights,
    )
