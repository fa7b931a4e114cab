"""What the user calls: finds, reads and writes."""

import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxattr.counts import whole_number
from jaxattr.files import writable_file, written_whole
from jaxattr.index.index import Index, check_index
from jaxattr.index.queries import QueryFeatures, accepted_by, query_features
from jaxattr.inputs.data import like
from jaxattr.reports import facts, tokens
from jaxattr.reports.cards import Cards, Contributions, Query, most_tokens
from jaxattr.reports.examples import Fields, Item, Picture, Showing, Tokens, read, worded
from jaxattr.reports.page import page
from jaxattr.reports.pictures import encoder
from jaxattr.reports.tokens import Pair
from jaxattr.scores.ranking import TopK
from jaxattr.scores.scoring import top_k
from jaxattr.scores.weighting import weight_array
from jaxattr.sources import Source, as_source
from jaxattr.store.folder import on_first_process
from jaxattr.typing import Example, Weights

TITLE = "Which training examples made the model do this?"


def report(
    index: Index,
    queries: Any,
    *,
    weights: Weights | None = None,
    k: int = 8,
    render: Callable[[Example], Any] | None = None,
    labels: Sequence[str] | Mapping[int, str] | Callable[[Example], Any] | None = None,
    predictions: Sequence[Any] | None = None,
    decode: Callable[[int], str] | None = None,
    train: Any = None,
    title: str | None = None,
    path: str | os.PathLike[str] = "report.html",
) -> pathlib.Path:
    """Writes a page to look at: queries beside the training examples that did it.

    One file that needs nothing else and no network: each query with its strongest proponents
    (positive scores) and opponents (negative), the weights of the groups, the gain, warnings, and
    what the scores come from. It can be sorted, filtered, printed and sent.

    What is shown of an example, without `render`, is guessed in this order:

    - `inputs`, `targets` and `mask`, each [t]: tokens (`decode` gives their texts). Each is
      coloured by what it contributes to the score: those of the query, unless scores are squares;
      those of the training example where the method's kernel is the identity. Where the
      contributions do not add up to the score (a loss that is no sum over targets), none is.
    - With `decode`, the text of the fields that are vectors of at least 2 integers, not coloured;
      in a table, if there is more than one such field and the label. Fields whose names have
      `mask`, `type_ids` or `position` in them are no text, and negative ids are left out.
    - A picture: the first of the fields `image`, `images`, `img`, `pixels`, `picture`, `x` and
      `inputs`, the first part of a tuple, or the whole example, that is [h, w] or [h, w, 1|3|4],
      with sides of at least 4 pixels that differ by less than 8 times. Flat vectors are never
      guessed to be pictures: `render=lambda example: example["x"].reshape(28, 28)`.
    - A table of the fields; arrays of more than 32 numbers as a range.

    Pictures of uint8 are shown as they are. Others are taken to be between 0 and 1 if all are,
    between -1 and 1 if all are, or else between the smallest and the largest value of the page.

    Args:
      index: the index.
      queries: as in `ja.score`; of `QueryFeatures` the scores are shown, and not the queries.
      weights: {group name: weight}, or what `ja.learn_weights` returned, whose gain, shares and
        warnings are shown too. Default: one each.
      k: proponents, and as many opponents, per query; fewer where fewer have the sign.
      render: what to show of ONE example, NumPy arrays without a batch axis: an array [h, w] or
        [h, w, 1|3|4] is a picture, a str a text, a dict a table.
      labels: names of classes, in order or by number, for the first of the fields `y`, `label`,
        `labels` that is one integer; or a function from an example to its label. Default: that
        integer.
      predictions: what the model said, one per query: texts or numbers.
      decode: token id -> its text, with the space before or after it. Default: its number. Not
        for `render`, which shows what it likes.
      train: the training data, if the index does not know them: as in `ja.build_index`.
      title: of the page.
      path: of the file; one that is there is replaced when the new one is whole.

    Returns:
      Where the page is.

    Raises:
      TypeError: if k is no whole number, weights are no mapping and no fit, render or decode no
        function, or labels or predictions no sequence.
      ValueError: if training examples are not at hand or of another number, weights or k are wrong,
        `render` returns what cannot be shown, there is nothing to `decode`, predictions are not
        one per query, or the path cannot be written.

    Cost: the queries' features, two passes over the index, and the examples that are shown, which
      are all that is read of the training data; for tokens also a pass in forward mode for every
      pair that is shown, or two where the kernel is the identity; for short rows a gradient per
      token. Pictures take 4
      MB at most for 100 queries by 16: with less colour or smaller, where they are larger. So do
      tokens: of long rows, where there are many, the stretch that contributes most is shown.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import jaxattr as ja
      >>> def loss(params, example, key):
      ...     return (params["w"] @ example["x"] - example["y"]) ** 2
      >>> train = {"x": jnp.arange(12.0).reshape(6, 2), "y": jnp.arange(6) % 2}
      >>> index = ja.build_index(ja.tracin(loss), {"w": jnp.ones(2)}, train)
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> ja.report(index, train, labels=["even", "odd"], k=2, path=folder / "page.html").name
      'page.html'
    """
    path = writable_file(path)
    check_index(index)
    k = min(whole_number("k", k), index.size)
    weight_array(index.layout, weights)
    data, said = _train(index, train), _texts(predictions)
    showing = Showing(render, labels, decode)
    _refuse_labels_of_examples(labels, index.size)
    source, own = None, {}
    # Before anything that takes long: what cannot be shown is found out here.
    if not isinstance(queries, QueryFeatures):
        source = as_source(queries, "queries", accepted_by(index))
        _refuse_number(said, source.size)
        own = read(source, range(source.size), showing, "queries")
    prepared = query_features(index, queries)
    q = len(prepared.features)
    _refuse_number(said, q)
    ranked = _ranked(index, prepared, weights, k)
    ids = sorted({pair.train for sides in ranked for side in sides for pair in side or ()})
    shown = read(data, ids, showing, "training examples")
    finite = np.isin(np.arange(q), prepared.non_finite, invert=True)
    found = [
        Query(row, own.get(row), None if said is None else said[row], bool(finite[row]), *sides)
        for row, sides in enumerate(ranked)
    ]
    by_query, by_train = _split(index, source, data, prepared, weights, found, shown)
    every = [*shown.values(), *own.values()]
    tables = render is None and any(isinstance(item.shown, Fields) for item in every)
    pictures = [item.shown.pixels for item in every if isinstance(item.shown, Picture)]
    most = most_tokens(found, by_query)
    cards = Cards(shown, encoder(pictures), decode, by_query, by_train, tables, most)
    gathered = facts.gather(index, prepared, weights, importlib.metadata.version("jaxattr"))
    text = page(TITLE if title is None else title, gathered, found, cards)
    on_first_process(functools.partial(_write, path, text))
    return path


def _ranked(
    index: Index, prepared: QueryFeatures, weights: Weights | None, k: int
) -> list[tuple[tuple[Pair, ...], tuple[Pair, ...] | None]]:
    """The proponents and the opponents of each query."""
    proponents = _signed(top_k(index, prepared, k=k, weights=weights), 1)
    if index.link == "square":
        return [(pairs, None) for pairs in proponents]
    opponents = _signed(top_k(index, prepared, k=k, weights=weights, opponents=True), -1)
    return list(zip(proponents, opponents, strict=True))


def _signed(top: TopK, sign: int) -> list[tuple[Pair, ...]]:
    """The pairs of each query whose scores have the sign."""
    ids, scores = np.asarray(top.ids), np.asarray(top.scores, np.float64)
    return [
        tuple(
            Pair(query, int(i), float(score))
            for i, score in zip(ids[query], scores[query], strict=True)
            if i >= 0 and sign * score > 0
        )
        for query in range(len(ids))
    ]


def _split(
    index: Index,
    queries: Source | None,
    train: Source,
    prepared: QueryFeatures,
    weights: Weights | None,
    found: Sequence[Query],
    shown: dict[int, Item],
) -> tuple[Contributions, Contributions]:
    """Contributions of the tokens of queries and of training examples, where those are tokens."""
    pairs = [pair for query in found for pair in (*query.proponents, *(query.opponents or ()))]
    any_tokens = any(isinstance(item.shown, Tokens) for item in shown.values())
    if not any_tokens or not tokens.can_split(index):
        return {}, {}
    by_train = tokens.of_examples(index, train, prepared, weights, pairs)
    own = found[0].item
    if queries is None or own is None or not isinstance(own.shown, Tokens):
        return {}, by_train
    return tokens.of_queries(index, queries, weights, pairs), by_train


def _train(index: Index, train: Any) -> Source:
    known = None if index.featurizer is None else like(index.featurizer.example)
    source = index.train if train is None else as_source(train, "train", known)
    if source is None:
        raise ValueError(
            "A report shows training examples, and this index was opened without them: pass "
            "ja.open_index(..., train=), which checks that they are the right ones, or "
            "ja.report(..., train=)."
        )
    if source.size != index.size:
        raise ValueError(
            f"train must be what the index was made from, {index.size} examples, got {source.size}."
        )
    return source


def _texts(predictions: Sequence[Any] | None) -> list[str] | None:
    if isinstance(predictions, str):
        raise ValueError(f"predictions must be a sequence of texts, got one: {predictions!r}.")
    if predictions is not None and not hasattr(predictions, "__iter__"):
        raise TypeError(
            f"predictions must be a sequence, one for each query, got {predictions!r:.80} of type "
            f"{type(predictions).__name__}."
        )
    return None if predictions is None else [worded(each) for each in predictions]


def _refuse_labels_of_examples(labels: Any, n: int) -> None:
    listed = np.ndim(labels) == 1 and not isinstance(labels, Mapping) and not callable(labels)
    if listed and len(labels) == n > len(set(map(str, labels))):
        raise ValueError(
            f"labels are the names of classes 0, 1, ..., and these are {n}, one per training "
            "example, some of them more than once: pass each name once, or a function from an "
            "example to its label."
        )


def _refuse_number(said: list[str] | None, q: int) -> None:
    if said is not None and len(said) != q:
        raise ValueError(f"predictions must be one per query, {q}, got {len(said)}.")


def _write(path: pathlib.Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
