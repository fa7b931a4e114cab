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
from jaxattr.scores.ranking import TrainSide, fresh_rows, local_contributions, side_axes, train_side
from jaxattr.sharding import DATA, Placement
from jaxattr.store.rows import EXAMPLES
from jaxattr.typing import Features


class Shortlist(NamedTuple):
    """What one pass over the training set leaves of the contributions of some queries.

    Attributes:
      ids: of the strongest examples, [q, s]; -1 where there is none.
      parts: their contributions, [q, s, m].
      dropped: the largest strength of the others, or a bound on it, [q]; -inf if there are none.
      radius: the largest norm of the others' weighted contributions, [q].
      gram: sum of c_n c_n^T over all examples, [q, m, m].
      largest: largest absolute contribution, [q, m].
      weights: w of the pass, [m].
    """

    ids: jax.Array
    parts: jax.Array
    dropped: jax.Array
    radius: jax.Array
    gram: jax.Array
    largest: jax.Array
    weights: jax.Array

    def rows(self, positions: jax.Array) -> "Shortlist":
        """Those of some queries."""
        return Shortlist._make([*(x[positions] for x in self[:-1]), self.weights])


@jax.jit
def everything(contributions: jax.Array, w: jax.Array) -> Shortlist:
    """A list of all examples, which drops none.

    Args:
      contributions: [q, n, m].
      w: weights [m].
    """
    q, n, _ = contributions.shape
    nothing = jnp.zeros(q, contributions.dtype)
    return Shortlist(
        ids=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (q, n)),
        parts=contributions,
        dropped=nothing - jnp.inf,
        radius=nothing,
        gram=jnp.einsum("qnm,qnk->qmk", contributions, contributions, precision="highest"),
        largest=jnp.abs(contributions).max(axis=1),
        weights=w,
    )


def strengths(listed: Shortlist, w: jax.Array, squared: bool) -> jax.Array:
    """What the listed examples are ranked by: their scores, or the sizes of these.

    Args:
      listed: the shortlist.
      w: weights [m].
      squared: whether scores are squares, which rank as sizes do.

    Returns:
      [q, s], -inf where there is no example.
    """
    scores = jnp.matmul(listed.parts, w.astype(listed.parts.dtype), precision="highest")
    return jnp.where(listed.ids >= 0, jnp.abs(scores) if squared else scores, -jnp.inf)


def sum_of_squares(listed: Shortlist, w: jax.Array) -> jax.Array:
    """Sum of squared scores over all examples, [q].

    Args:
      listed: the shortlist.
      w: weights [m].
    """
    w = w.astype(listed.gram.dtype)
    product = jnp.matmul(listed.gram, w, precision="highest")  # [q, m]
    return jnp.maximum(jnp.matmul(product, w, precision="highest"), 0)


def bounds(listed: Shortlist, w: jax.Array) -> jax.Array:
    """What no dropped example's strength exceeds under other weights, [q].

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
    """Examples per query, [q, r] and [q, r, m].

    Attributes:
      ids: -1 where there is none.
      parts: contributions.
      strengths: under the weights of the pass; -inf where there is none.
      lengths: norms of weighted contributions.
      digests: of the examples' features, [q, r, 2].
    """

    ids: jax.Array
    parts: jax.Array
    strengths: jax.Array
    lengths: jax.Array
    digests: jax.Array


class _Pass(NamedTuple):
    """What a device has found so far.

    Attributes:
      rows: on the list, [q, s].
      radius: the largest norm of the weighted contributions of rows that are on no list, [q].
      gram: sum of c_n c_n^T, [q, m, m].
      largest: largest absolute contribution, [q, m].
      weights: of the pass, [m].
    """

    rows: _Rows
    radius: jax.Array
    gram: jax.Array
    largest: jax.Array
    weights: jax.Array


@functools.lru_cache(maxsize=16)
def compiled_pass(
    place: Placement, layout: FeatureLayout, length: int, squared: bool, top_k: int
) -> tuple[Any, Any, Any]:
    """The steps of a pass.

    Args:
      place: the devices.
      layout: the groups.
      length: examples per list and device.
      squared: whether scores are squares.
      top_k: examples of a top k; a list takes as many copies of one, and no more.

    Returns:
      start: (w, phi [q, c * p]) -> a state per device;
      absorb: (state, phi, slab, first id, blocks seen before) -> state;
      merge: state -> the shortlist, on every device.
    """
    own = (DATA,)  # every array of the state has a leading axis of devices
    absorbing = place.over_shards(
        functools.partial(_absorb, place, layout, squared, top_k), (own, (), side_axes, (), ()), own
    )
    merging = place.over_shards(functools.partial(_merge, place), (own,), ())

    def start(w: jax.Array, phi: Features) -> _Pass:
        q, m, shards = len(phi), len(layout.names), place.shards
        dtype = wide(phi.dtype)
        zeros = functools.partial(jnp.zeros, dtype=dtype)
        rows = _Rows(
            jnp.full((shards, q, length), -1, jnp.int32),
            zeros((shards, q, length, m)),
            jnp.full((shards, q, length), -jnp.inf, dtype),
            zeros((shards, q, length)),
            jnp.zeros((shards, q, length, identity.LANES), jnp.uint32),
        )
        weights = jnp.broadcast_to(w.astype(dtype)[None], (shards, m))
        gram, largest = zeros((shards, q, m, m)), zeros((shards, q, m))
        return _Pass(rows, zeros((shards, q)), gram, largest, weights)

    return jax.jit(start), jax.jit(absorbing, donate_argnums=0), jax.jit(merging)


def _absorb(
    place: Placement,
    layout: FeatureLayout,
    squared: bool,
    top_k: int,
    found: _Pass,
    phi: Features,
    arrays: dict[str, jax.Array],
    first: Any,
    skip: Any,
) -> _Pass:
    """Takes a slab in; every array of the state has a leading axis of one device."""
    found = jax.tree.map(lambda x: x[0], found)
    numbers, fresh = fresh_rows(place, arrays[EXAMPLES].shape[:2], first, skip)
    side = train_side(place, arrays)
    counted = side.counted & fresh
    digests = _digests(place, side)  # [r, 2]
    parts = local_contributions(place, layout, phi, arrays)  # [q, r, m]
    parts = jnp.where(counted[None, :, None], parts, 0).astype(found.gram.dtype)
    listable = counted & ~_further_copies(digests, counted, jnp.moveaxis(parts, 1, 0), top_k)
    weighted = parts * found.weights[None, None]
    scores, lengths = weighted.sum(axis=-1), jnp.linalg.norm(weighted, axis=-1)  # [q, r]
    ids = jnp.where(counted, numbers, -1).astype(found.rows.ids.dtype)
    rows = _Rows(
        jnp.broadcast_to(ids[None], scores.shape),
        parts,
        jnp.where(listable[None], jnp.abs(scores) if squared else scores, -jnp.inf),
        jnp.where(listable[None], lengths, 0),
        jnp.broadcast_to(digests[None], (*scores.shape, identity.LANES)),
    )
    length = found.rows.ids.shape[1]
    candidates, left = _strongest(rows, length)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), found.rows, candidates)
    kept, evicted = _strongest(_without_copies(both, top_k), length)
    gram = jnp.einsum("qrm,qrk->qmk", parts, parts, precision="highest")
    new = _Pass(
        rows=kept,
        radius=functools.reduce(jnp.maximum, (found.radius, left, evicted)),
        gram=found.gram + gram,
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
        strengths=jnp.where(out, -jnp.inf, rows.strengths),
        lengths=jnp.where(out, 0, rows.lengths),
    )


def _strongest(rows: _Rows, length: int) -> tuple[_Rows, jax.Array]:
    """The strongest, at most so many; and the largest norm of the others, [q]."""
    if rows.ids.shape[1] <= length:
        return rows, jnp.zeros(len(rows.ids), rows.lengths.dtype)
    _, places = jax.lax.top_k(rows.strengths, length)
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

    def joined(x: jax.Array) -> jax.Array:  # [shards, q, s, ...] -> [q, shards * s, ...]
        x = jnp.moveaxis(place.gather_shards(x), 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    # By id, so that ties go to the lower one, as they do where all examples are listed.
    ids, parts = joined(found.rows.ids), joined(found.rows.parts)
    order = jnp.argsort(ids, axis=-1)
    # A full list's weakest example bounds what was dropped; a list with room dropped nothing.
    return Shortlist(
        ids=jnp.take_along_axis(ids, order, axis=-1),
        parts=jnp.take_along_axis(parts, order[..., None], axis=-2),
        dropped=place.largest_of_shards(found.rows.strengths.min(axis=-1)),
        radius=place.largest_of_shards(found.radius),
        gram=place.sum_shards(found.gram),
        largest=place.largest_of_shards(found.largest),
        weights=found.weights,
    )
