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

Copies of one training example score alike under all weights, and k of them fill a top k. So of rows
with the same contributions a list takes k at most, and the others need no bound: whatever bounds,
or lists, the k bounds them too. Without that, a page that a crawl holds 600 times would fill every
list, and no certificate would outlast a step. Digests of features only put rows side by side; their
contributions are compared, so that two rows that share a digest are no copies for that.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattr import identity
from jaxattr.features.plans import FeatureLayout
from jaxattr.scales import wide
from jaxattr.scores.ranking import (
    TrainSide,
    local_contributions,
    side_axes,
    slab_ids,
    train_side,
)
from jaxattr.sharding import DATA, Placement
from jaxattr.store.rows import EXAMPLES
from jaxattr.typing import Features


class Shortlist(NamedTuple):
    """What one pass over the training set leaves of the contributions of some queries.

    Attributes:
      ids: of the listed examples, [l, q, s]; -1 where there is none. One list holds the largest
        scores; a second, where it is wanted, the smallest.
      parts: their contributions, [l, q, s, m].
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
            for name in ("ids", "parts", "dropped", "radius")
        }
        gram = None if self.gram is None else self.gram[positions]
        squares, largest = self.squares[positions], self.largest[positions]
        return self._replace(**lists, gram=gram, squares=squares, largest=largest)


@jax.jit
def everything(contributions: jax.Array, w: jax.Array) -> Shortlist:
    """A list of all examples.

    Args:
      contributions: [q, n, m].
      w: weights [m].

    Returns:
      One list, that drops none.
    """
    q, n, _ = contributions.shape
    nothing = jnp.zeros((1, q), contributions.dtype)
    return Shortlist(
        ids=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, None], (1, q, n)),
        parts=contributions[None],
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


class _Rows(NamedTuple):
    """Examples per query, [q, r] and [q, r, m]; of several lists, [l, q, r] and [l, q, r, m].

    Attributes:
      ids: -1 where there is none.
      parts: contributions.
      scores: signed, under the weights of the pass.
      lengths: norms of weighted contributions.
      digests: of the examples' features, [q, r, 2].
    """

    ids: jax.Array
    parts: jax.Array
    scores: jax.Array
    lengths: jax.Array
    digests: jax.Array


class _Pass(NamedTuple):
    """What a device has found so far.

    Attributes:
      rows: on each list, [l, q, s].
      radius: the largest norm of the weighted contributions of rows that are on no list, [l, q].
      gram: sum of c_n c_n^T, [q, m, m].
      squares: sum of squared contributions, [q, m].
      largest: largest absolute contribution, [q, m].
      weights: of the pass, [m].
    """

    rows: _Rows
    radius: jax.Array
    gram: jax.Array
    squares: jax.Array
    largest: jax.Array
    weights: jax.Array


@functools.lru_cache(maxsize=16)
def compiled_pass(
    place: Placement, layout: FeatureLayout, length: int, signs: tuple[int, ...], top_k: int
) -> tuple[Any, Any, Any]:
    """The steps of a pass.

    Args:
      place: the devices.
      layout: the groups.
      length: examples per list and device.
      signs: 1 for a list of the largest scores, -1 for one of the smallest.
      top_k: examples of a top k; a list takes as many copies of one, and no more.

    Returns:
      start: (w, phi [q, c * p]) -> a state per device;
      absorb: (state, phi, slab, first id, blocks seen before) -> state;
      merge: state -> the shortlist, on every device.
    """
    own = (DATA,)  # every array of the state has a leading axis of devices
    absorbing = place.over_shards(
        functools.partial(_absorb, place, layout, signs, top_k), (own, (), side_axes, (), ()), own
    )
    merging = place.over_shards(functools.partial(_merge, place), (own,), ())

    def start(w: jax.Array, phi: Features) -> _Pass:
        q, m, lists, shards = len(phi), len(layout.names), len(signs), place.shards
        dtype = wide(phi.dtype)
        zeros = functools.partial(jnp.zeros, dtype=dtype)
        rows = _Rows(
            jnp.full((shards, lists, q, length), -1, jnp.int32),
            zeros((shards, lists, q, length, m)),
            jnp.full((shards, lists, q, length), -jnp.inf, dtype),
            zeros((shards, lists, q, length)),
            jnp.zeros((shards, lists, q, length, identity.LANES), jnp.uint32),
        )
        return _Pass(
            rows=rows,
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
    top_k: int,
    found: _Pass,
    phi: Features,
    arrays: dict[str, jax.Array],
    first: Any,
    skip: Any,
) -> _Pass:
    """Takes a slab in; every array of the state has a leading axis of one device."""
    found = jax.tree.map(lambda x: x[0], found)
    g, b = arrays[EXAMPLES].shape[:2]
    fresh = jnp.repeat(jnp.arange(g) >= skip, b)
    side = train_side(place, arrays)
    counted = side.counted & fresh
    digests = _digests(place, side)  # [r, 2]
    parts = local_contributions(place, layout, phi, arrays)  # [q, r, m]
    parts = jnp.where(counted[None, :, None], parts, 0).astype(found.gram.dtype)
    listable = counted & ~_further_copies(digests, counted, jnp.moveaxis(parts, 1, 0), top_k)
    weighted = parts * found.weights[None, None]
    scores, lengths = weighted.sum(axis=-1), jnp.linalg.norm(weighted, axis=-1)  # [q, r]
    ids = jnp.where(counted, slab_ids(place, (g, b), first), -1).astype(found.rows.ids.dtype)
    ids = jnp.broadcast_to(ids[None], scores.shape)
    digests = jnp.broadcast_to(digests[None], (*scores.shape, identity.LANES))
    lengths = jnp.where(listable[None], lengths, 0)
    lists = []
    for number, sign in enumerate(signs):
        signed = jnp.where(listable[None], sign * scores, -jnp.inf)
        before = jax.tree.map(lambda x, i=number: x[i], found.rows)
        rows = _Rows(ids, parts, signed, lengths, digests)
        candidates, left = _strongest(rows, before.ids.shape[1])
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, candidates)
        both = _without_copies(both, top_k)
        kept, evicted = _strongest(both, before.ids.shape[1])
        lists.append((kept, functools.reduce(jnp.maximum, (found.radius[number], left, evicted))))
    kept, radius = jax.tree.map(lambda *each: jnp.stack(each), *lists)
    gram = jnp.einsum("qrm,qrk->qmk", parts, parts, precision="highest")
    new = _Pass(
        rows=kept,
        radius=radius,
        gram=found.gram + gram,
        squares=found.squares + jnp.einsum("qmm->qm", gram),
        largest=jnp.maximum(found.largest, jnp.abs(parts).max(axis=1)),
        weights=found.weights,
    )
    return jax.tree.map(lambda x: x[None], new)


def _digests(place: Placement, side: TrainSide) -> jax.Array:
    """Digests of the features of a device's rows, whichever of their columns it has; [r, 2]."""
    own = identity.row_digests((side.features, side.residual[:, None]))
    numbered = own + jnp.asarray(place.column(), jnp.uint32)
    found = place.sum_columns(identity.mixed(numbered))
    return found[:, : identity.LANES] + identity.mixed(found[:, identity.LANES :])


def _further_copies(
    digests: jax.Array, present: jax.Array, parts: jax.Array, top_k: int
) -> jax.Array:
    """Which rows [r] come after as many present ones with the same contributions, [r, ..., m]."""
    r = len(present)
    keys = (~present, *jnp.moveaxis(digests, -1, 0), jnp.arange(r))
    absent, *words, order = jax.lax.sort(keys, num_keys=len(keys))
    ordered = parts[order]
    new = jnp.any(ordered != jnp.roll(ordered, 1, axis=0), axis=tuple(range(1, parts.ndim)))
    for word in (absent, *words):
        new |= word != jnp.roll(word, 1)
    begin = jax.lax.cummax(jnp.where(new, jnp.arange(r), 0))
    further = jnp.arange(r) - begin >= top_k
    return jnp.zeros(r, bool).at[order].set(further) & present


def _without_copies(rows: _Rows, top_k: int) -> _Rows:
    """Rows of several queries, from each of which copies beyond the k-th are taken out."""
    further = functools.partial(_further_copies, top_k=top_k)
    out = jax.vmap(further)(rows.digests, rows.ids >= 0, rows.parts)
    return rows._replace(
        ids=jnp.where(out, -1, rows.ids),
        scores=jnp.where(out, -jnp.inf, rows.scores),
        lengths=jnp.where(out, 0, rows.lengths),
    )


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


def _merge(place: Placement, found: _Pass) -> Shortlist:
    """Joins the lists of all devices; sums and extremes over them."""
    found = jax.tree.map(lambda x: x[0], found)

    def joined(x: jax.Array) -> jax.Array:  # [shards, l, q, s, ...] -> [l, q, shards * s, ...]
        x = jnp.moveaxis(place.gather_shards(x), 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    # By id, so that ties go to the lower one, as they do where all examples are listed.
    ids, parts = joined(found.rows.ids), joined(found.rows.parts)
    order = jnp.argsort(ids, axis=-1)
    # A full list's weakest example bounds what was dropped; a list with room dropped nothing.
    return Shortlist(
        ids=jnp.take_along_axis(ids, order, axis=-1),
        parts=jnp.take_along_axis(parts, order[..., None], axis=-2),
        dropped=place.largest_of_shards(found.rows.scores.min(axis=-1)),
        radius=place.largest_of_shards(found.radius),
        gram=place.sum_shards(found.gram),
        squares=place.sum_shards(found.squares),
        largest=place.largest_of_shards(found.largest),
        weights=found.weights,
    )
