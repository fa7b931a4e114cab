r"""Learning weights without the array of contributions [q, n, m].

One pass over the training set keeps, per query, the contributions of the strongest examples under
the present weights (the shortlist), the Gram matrix of all contributions, which gives the norm of
the scores for any weights, and bounds on the examples that were dropped. As the weights move, the
top k of the shortlist are those of all examples for as long as a certificate holds; where it no
longer does, another pass is due. Results are those of the whole array, up to rounding.

The certificate (heuristics decide only how often a pass is due, not what is found): with weights w
now, v at the pass, any a >= 0, and c_n the contributions of a dropped example,

.. math:: s_n(w) = a\, s_n(v) + c_n^\top (w - a v) \le a \max_{dropped} s(v) + \min\Big(
          \sum_j \max_{dropped} c_{nj} (w - a v)_j, \;
          \max_{dropped} \|c_n v\|_2 \, \|(w - a v) / v\|_2 \Big)
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


class Dropped(NamedTuple):
    """Bounds on the examples that are not on a list.

    Attributes:
      best: their largest signed score, [l, q]; -inf if there are none.
      upper: their largest contribution per group, [l, q, m].
      lower: their smallest, [l, q, m].
      radius: their largest norm of weighted contributions, [l, q].
    """

    best: jax.Array
    upper: jax.Array
    lower: jax.Array
    radius: jax.Array


class Shortlist(NamedTuple):
    """What one pass over the training set leaves of the contributions of some queries.

    Attributes:
      ids: of the listed examples, [l, q, s]; -1 where there is none. One list holds the largest
        scores; a second, where it is wanted, the smallest.
      parts: their contributions, [l, q, s, m].
      scores: their signed scores under the weights of the pass, [l, q, s].
      gram: sum of c_n c_n^T over all examples, [q, m, m]; None if every example is listed.
      squares: sum of squared contributions over all examples, [q, m].
      largest: largest absolute contribution, [q, m].
      dropped: bounds on the others; None if every example is listed.
      weights: w of the pass, [m].
    """

    ids: jax.Array
    parts: jax.Array
    scores: jax.Array
    gram: jax.Array | None
    squares: jax.Array
    largest: jax.Array
    dropped: Dropped | None
    weights: jax.Array

    def rows(self, positions: jax.Array) -> "Shortlist":
        """Those of some queries."""

        def of_lists(x: jax.Array) -> jax.Array:
            return x[:, positions]

        return Shortlist(
            ids=of_lists(self.ids),
            parts=of_lists(self.parts),
            scores=of_lists(self.scores),
            gram=None if self.gram is None else self.gram[positions],
            squares=self.squares[positions],
            largest=self.largest[positions],
            dropped=None if self.dropped is None else Dropped(*map(of_lists, self.dropped)),
            weights=self.weights,
        )


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
    return Shortlist(
        jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, None], (1, q, n)),
        contributions[None],
        scores[None],
        None,
        jnp.sum(contributions**2, axis=1),
        jnp.abs(contributions).max(axis=1),
        None,
        w,
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
    if listed.dropped is None:  # one list, which serves for both ends
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


def bounds(listed: Shortlist, w: jax.Array, signs: tuple[int, ...]) -> jax.Array:
    """What no dropped example's signed score exceeds under other weights, [l, q].

    Args:
      listed: the shortlist.
      w: weights [m], not negative.
      signs: as in `signed_scores`.
    """
    assert listed.dropped is not None
    v, dropped = listed.weights, listed.dropped
    ratio = jnp.where(v > 0, w / jnp.where(v > 0, v, 1), 1)
    a = ratio.mean()
    moved = (w - a * v).astype(dropped.upper.dtype)
    along = jnp.asarray(signs, moved.dtype)[:, None, None] * moved[None, None]  # [l, 1, m]
    each = jnp.maximum(along * dropped.upper, along * dropped.lower).sum(axis=-1)  # [l, q]
    together = dropped.radius * jnp.linalg.norm(ratio - a).astype(dropped.radius.dtype)
    # A group without weight then and with weight now is in no radius.
    together = jnp.where(jnp.any((v == 0) & (w > 0)), jnp.inf, together)
    bound = a.astype(each.dtype) * dropped.best + jnp.minimum(each, together)
    return jnp.where(dropped.best == -jnp.inf, -jnp.inf, bound)


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
        dropped = Dropped(
            low((shards, lists, q)),
            low((shards, lists, q, m)),
            -low((shards, lists, q, m)),
            zeros((shards, lists, q)),
        )
        return Shortlist(
            jnp.full((shards, lists, q, length), -1, jnp.int32),
            zeros((shards, lists, q, length, m)),
            low((shards, lists, q, length)),
            zeros((shards, q, m, m)),
            zeros((shards, q, m)),
            zeros((shards, q, m)),
            dropped,
            jnp.broadcast_to(w.astype(dtype)[None], (shards, m)),
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
    assert listed.gram is not None and listed.dropped is not None
    g, b = arrays[EXAMPLES].shape[:2]
    fresh = jnp.repeat(jnp.arange(g) >= skip, b)
    counted = train_side(arrays).counted & fresh
    parts = local_contributions(place, layout, phi, arrays)  # [q, r, m]
    parts = jnp.where(counted[None, :, None], parts, 0).astype(listed.parts.dtype)
    scores = jnp.matmul(parts, listed.weights, precision="highest")  # [q, r]
    ids = slab_ids(place, (g, b), first).astype(listed.ids.dtype)
    found = [
        _absorb_list(listed, number, sign, parts, scores, ids, counted)
        for number, sign in enumerate(signs)
    ]
    kept = jax.tree.map(lambda *lists: jnp.stack(lists), *found)
    gram = jnp.einsum("qrm,qrk->qmk", parts, parts, precision="highest")
    new = Shortlist(
        ids=kept.ids,
        parts=kept.parts,
        scores=kept.scores,
        gram=listed.gram + gram,
        squares=listed.squares + jnp.einsum("qmm->qm", gram),
        largest=jnp.maximum(listed.largest, jnp.abs(parts).max(axis=1)),
        dropped=kept.dropped,
        weights=listed.weights,
    )
    return jax.tree.map(lambda x: x[None], new)


class _OneList(NamedTuple):
    ids: jax.Array
    parts: jax.Array
    scores: jax.Array
    dropped: Dropped


def _absorb_list(
    listed: Shortlist,
    number: int,
    sign: int,
    parts: jax.Array,
    scores: jax.Array,
    ids: jax.Array,
    counted: jax.Array,
) -> _OneList:
    """One list, and the bounds on what is not on it."""
    assert listed.dropped is not None
    length = listed.ids.shape[-1]
    signed = jnp.where(counted[None], sign * scores, -jnp.inf)
    all_scores = jnp.concatenate([listed.scores[number], signed], axis=1)  # [q, s + r]
    new_ids = jnp.broadcast_to(jnp.where(counted, ids, -1)[None], signed.shape)
    all_ids = jnp.concatenate([listed.ids[number], new_ids], axis=1)
    all_parts = jnp.concatenate([listed.parts[number], parts], axis=1)
    values, places = jax.lax.top_k(all_scores, length)
    kept_ids = jnp.take_along_axis(all_ids, places, axis=1)
    kept_parts = jnp.take_along_axis(all_parts, places[..., None], axis=1)
    on_list = (
        jnp.zeros(all_scores.shape, bool).at[jnp.arange(len(places))[:, None], places].set(True)
    )
    off = ~on_list & (all_ids >= 0)
    before = Dropped(*(x[number] for x in listed.dropped))
    lengths = jnp.linalg.norm(all_parts * listed.weights[None, None], axis=-1)
    dropped = Dropped(
        jnp.maximum(before.best, jnp.where(off, all_scores, -jnp.inf).max(axis=1)),
        jnp.maximum(before.upper, jnp.where(off[..., None], all_parts, -jnp.inf).max(axis=1)),
        jnp.minimum(before.lower, jnp.where(off[..., None], all_parts, jnp.inf).min(axis=1)),
        jnp.maximum(before.radius, jnp.where(off, lengths, 0).max(axis=1)),
    )
    return _OneList(kept_ids, kept_parts, values, dropped)


def _merge(place: Placement, listed: Shortlist) -> Shortlist:
    """Joins the lists of all devices; sums and extremes over them."""
    listed = jax.tree.map(lambda x: x[0], listed)
    assert listed.dropped is not None

    def joined(x: jax.Array) -> jax.Array:  # [shards, l, q, s, ...] -> [l, q, shards * s, ...]
        x = jnp.moveaxis(place.gather_shards(x), 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    dropped = listed.dropped
    return Shortlist(
        joined(listed.ids),
        joined(listed.parts),
        joined(listed.scores),
        place.sum_shards(listed.gram),
        place.sum_shards(listed.squares),
        place.largest_of_shards(listed.largest),
        Dropped(
            place.largest_of_shards(dropped.best),
            place.largest_of_shards(dropped.upper),
            -place.largest_of_shards(-dropped.lower),
            place.largest_of_shards(dropped.radius),
        ),
        listed.weights,
    )
