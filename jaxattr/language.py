"""Language models: losses of one row of tokens, rows from documents, scores token by token.

A row is a mapping with

    inputs     int [t], the tokens that the model reads
    targets    int [t], what it should say at each position: the inputs shifted by one; of a masked
             model, whose rows are made by hand, the tokens themselves
    mask       bool [t], which targets count: not padding, and not the prompt of a fact (of a masked
             model, where tokens are hidden); or weights, of which none is negative (such a row has
             no finite gradient)
    segments   int [t], the document of each position where several share a row; 0 is padding
    positions  int [t], of each token within its document

of which the last two are there in packed rows only, for the model to keep documents apart.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxattr.counts import flag, whole_number
from jaxattr.index.index import Index, check_index, report_non_finite
from jaxattr.index.parts import check_sum, part_features
from jaxattr.index.queries import QueryFeatures, accepted_by
from jaxattr.inputs.data import as_batch
from jaxattr.inputs.outputs import check_function
from jaxattr.inputs.wording import shapes
from jaxattr.scales import wide
from jaxattr.typing import Example, Key, OutputFn, Params

LogitsFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""(params, row) -> logits [t, vocabulary]; those at position i are for `targets[i]`."""

Rows: TypeAlias = dict[str, np.ndarray]
"""Rows as above, with a leading axis."""


def loss(logits_fn: LogitsFn) -> OutputFn:
    """Makes the loss of a row: cross-entropy, summed over the targets that count.

    Args:
      logits_fn: the model, (params, row) -> logits [t, vocabulary].

    Returns:
      The loss, (params, row, key) -> float32 scalar, for any method. It can draw targets from the
      model for the true Fisher: its attribute `sample` is what `ja.ekfac(..., fisher="true")` uses.

    Example:
      >>> params = {"logits": jnp.log(jnp.array([0.25, 0.75]))}
      >>> of_row = loss(lambda params, row: jnp.tile(params["logits"], (3, 1)))
      >>> row = {"inputs": jnp.zeros(3, int), "targets": jnp.array([0, 1, 1]),
      ...        "mask": jnp.array([True, True, False])}
      >>> round(float(of_row(params, row, jax.random.key(0))), 3)  # log 4 + log 4/3
      1.674
    """

    def total(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return -_summed(log_probabilities(logits, targets), mask)

    of_row = _of_targets(logits_fn, total)

    def sample(params: Params, example: Example, key: Key) -> Example:
        targets, logits = example["targets"], logits_fn(params, example)
        # In bfloat16 the noise that decides has 128 values, and of equal ones the first wins.
        drawn = jax.random.categorical(key, logits.astype(wide(logits.dtype)))
        drawn = drawn.astype(targets.dtype)
        return {**example, "targets": jnp.where(example["mask"], drawn, targets)}

    of_row.sample = sample  # type: ignore[attr-defined]
    return of_row


def margin(logits_fn: LogitsFn) -> OutputFn:
    """Makes the sum over targets of log(p / (1 - p)), TRAK's output function.

    Args:
      logits_fn: the model, (params, row) -> logits [t, vocabulary].

    Returns:
      (params, row, key) -> float32 scalar; pass `residual(logits_fn)` to `ja.trak` with it.
    """

    def total(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return _summed(_log_odds(logits, targets), mask)

    return _of_targets(logits_fn, total)


def residual(logits_fn: LogitsFn) -> OutputFn:
    """Makes the mean over targets of 1 - p: TRAK's residual of a row.

    Args:
      logits_fn: the model, (params, row) -> logits [t, vocabulary].

    Returns:
      (params, row, key) -> float32 scalar between 0 and 1.
    """

    def mean(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return _mean(jax.nn.sigmoid(-_log_odds(logits, targets)), mask)

    return _of_targets(logits_fn, mean)


def probability(logits_fn: LogitsFn) -> OutputFn:
    """Makes the mean probability of a row's targets; of a single target, its probability.

    Args:
      logits_fn: the model, (params, row) -> logits [t, vocabulary].

    Returns:
      (params, row, key) -> float32 scalar between 0 and 1; what `evaluation.tail_patch` measures.
    """

    def mean(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return _mean(jnp.exp(log_probabilities(logits, targets)), mask)

    return _of_targets(logits_fn, mean)


def log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the log-probability of each target, in float32 or wider.

    Args:
      logits: float [t, vocabulary].
      targets: int [t].

    Returns:
      Float [t]; NaN where a target is no token of the vocabulary.

    Raises:
      ValueError: if targets are no integers, or not one per position.
    """
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    fits = logits.ndim > 0 and targets.shape == logits.shape[:-1]
    if not fits or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be integers {list(logits.shape[:-1])}, one for each position of logits "
            f"{list(logits.shape)}; got {targets.dtype} {list(targets.shape)}."
        )
    logits = logits.astype(wide(logits.dtype))
    return _picked(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def rows(
    documents: Sequence[Sequence[int]],
    length: int,
    *,
    vocabulary: int,
    prompts: Sequence[int] | None = None,
    truncate: bool = False,
) -> Rows:
    """Makes one row per document, padded at its end.

    Args:
      documents: token ids of each; the first token is read, and not asked for.
      length: positions t per row; a document of t + 1 tokens fills it.
      vocabulary: number of tokens that the model knows.
      prompts: number of leading tokens of each document that are given, and not asked for: the rest
        is the answer to a question. Default: 1 each.
      truncate: cuts documents that are longer, instead of raising.

    Returns:
      {inputs, targets, mask}, each [documents, length].

    Raises:
      ValueError: for a document that has no target, is too long, or holds an unknown token.

    Example:
      >>> made = rows([[5, 6, 7], [8, 9]], 3, vocabulary=10)
      >>> made["inputs"].tolist(), made["targets"].tolist()
      ([[5, 6, 0], [8, 0, 0]], [[6, 7, 0], [9, 0, 0]])
      >>> made["mask"].tolist()
      [[True, True, False], [True, False, False]]
    """
    checked, length = _checked(documents, vocabulary), whole_number("length", length)
    flag("truncate", truncate)
    given: Any = [1] * len(checked) if prompts is None else prompts
    starts = np.atleast_1d(list(given) if isinstance(given, Iterator) else given).tolist()
    if len(starts) != len(checked):
        raise ValueError(f"prompts must be one per document, {len(checked)}, got {len(starts)}.")
    inputs = np.zeros((len(checked), length), np.int32)
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    for number, (document, start) in enumerate(zip(checked, starts, strict=True)):
        start = whole_number(f"prompts[{number}]", start)
        if len(document) > length + 1 and not truncate:
            raise ValueError(
                f"Document {number} has {len(document)} tokens, and a row of {length} positions "
                f"takes {length + 1}. Use longer rows, up to the model's context, split the "
                "document, or pass truncate=True."
            )
        document = document[: length + 1]
        if start >= len(document):
            raise ValueError(
                f"Document {number} has no target: {len(document)} tokens, of which the first "
                f"{start} are the prompt. A document needs at least one token after its prompt."
            )
        t = len(document) - 1
        inputs[number, :t], targets[number, :t] = document[:-1], document[1:]
        mask[number, start - 1 : t] = True
    return {"inputs": inputs, "targets": targets, "mask": mask}


def packed(documents: Sequence[Sequence[int]], length: int, *, vocabulary: int) -> Rows:
    """Fills rows with documents one after the other; what does not fit goes on in the next row.

    Segments keep documents apart, if the model heeds them: the loss of a row is then the sum of its
    documents' losses. For training; attribution to single documents takes `rows`.

    Args:
      documents: token ids of each.
      length: positions t per row.
      vocabulary: number of tokens that the model knows.

    Returns:
      {inputs, targets, mask, segments, positions}, each [rows, length].

    Raises:
      ValueError: for a document of fewer than two tokens, or with an unknown token.

    Example:
      >>> made = packed([[5, 6, 7], [8, 9]], 4, vocabulary=10)
      >>> made["inputs"].tolist(), made["targets"].tolist()
      ([[5, 6, 8, 0]], [[6, 7, 9, 0]])
      >>> made["segments"].tolist(), made["positions"].tolist()
      ([[1, 1, 2, 0]], [[0, 1, 0, 0]])
    """
    length, checked = whole_number("length", length), _checked(documents, vocabulary)
    columns: dict[str, list[int]] = {"inputs": [], "targets": [], "segments": [], "positions": []}
    for number, document in enumerate(checked):
        if len(document) < 2:
            raise ValueError(f"Document {number} has {len(document)} tokens; it needs two or more.")
        start = 0
        while start < len(document) - 1:
            room = length - len(columns["inputs"]) % length
            piece = document[start : start + room + 1]
            columns["inputs"] += piece[:-1].tolist()
            columns["targets"] += piece[1:].tolist()
            columns["segments"] += [number + 1] * (len(piece) - 1)
            columns["positions"] += range(len(piece) - 1)
            start += room
    padding = -len(columns["inputs"]) % length
    made = {
        name: np.array(column + [0] * padding, np.int32).reshape(-1, length)
        for name, column in columns.items()
    }
    segments = made["segments"]
    first = np.min(np.where(segments > 0, segments, np.iinfo(np.int32).max), axis=1, keepdims=True)
    made["segments"] = np.where(segments > 0, segments - first + 1, 0).astype(np.int32)
    return {**made, "mask": segments > 0}


def tokens_of(row: Example) -> Example:
    """Splits a row into one per position, each with that position's target alone.

    Args:
      row: a row with `mask` [t].

    Returns:
      The row with every array [t, ...]; the sum of their losses is the row's loss.
    """
    numbers = jnp.arange(row["mask"].shape[0])
    return jax.vmap(functools.partial(token_of, row))(numbers)


def token_of(row: Example, number: jax.Array) -> Example:
    """Returns a row that asks for the target at one position alone.

    Args:
      row: a row with `mask` [t].
      number: of the position.

    Raises:
      ValueError: if the row has no such position.
    """
    count = row["mask"].shape[0]
    traced = isinstance(number, jax.core.Tracer)
    if not traced and whole_number("number", number, least=0) >= count:
        raise ValueError(f"The row has positions 0 to {count - 1}, and no {number}.")
    single = jnp.arange(count) == number
    return {**row, "mask": jnp.where(single, row["mask"], jnp.zeros_like(row["mask"]))}


def token_features(index: Index, queries: Any) -> QueryFeatures:
    """Features of each query token by itself, to be scored like queries.

    The feature of position i is that of the loss of `targets[i]`; they sum to the query's own, and
    so do scores and contributions. Methods that scale queries to unit norm use the norm of the
    whole query. Positions that do not count score zero.

    Args:
      index: the index, of a sum over targets: `loss` and `margin` are, means over targets not.
      queries: rows, a mapping of arrays [q, t], or a list of rows.

    Returns:
      Features of q * t queries, the tokens of the first query first:
      `ja.score(index, token_features(index, queries)).reshape(q, t, n)`.

    Raises:
      ValueError: if a query has no target, or outputs of tokens do not add up to the query's (tried
        at the first checkpoint on the query with the most targets).

    Guarantees: exact; sums agree with `ja.score(index, queries)` up to the rounding of the
      parameters' type.
    Cost: a forward and backward pass per token, a microbatch of them at a time: q t p numbers, and
      no weight gradient where the features are factored.
    """
    check_index(index)
    queries = as_batch(queries, "queries", accepted_by(index))
    check_targets(queries)
    longest = (np.asarray(queries["mask"]) > 0).sum(axis=-1).argmax()
    check_sum(index, jax.tree.map(lambda x: jnp.asarray(x[longest]), queries), tokens_of)
    found, (q, t) = part_features(index, queries, tokens_of), np.shape(queries["mask"])
    report_non_finite(np.unique(found.non_finite // t), q, "queries")
    return found


def check_targets(queries: Mapping[str, Any]) -> None:
    """Raises if a row asks for nothing.

    Args:
      queries: rows.

    Raises:
      ValueError: with the positions of rows without a target.
    """
    if not isinstance(queries, Mapping) or "mask" not in queries:
        raise TypeError(
            f"queries must be rows as `ja.language.rows` makes them, with a mask; got "
            f"{shapes(queries)}."
        )
    empty = np.flatnonzero(~np.asarray(queries["mask"]).astype(bool).any(axis=-1))
    if len(empty):
        raise ValueError(
            f"{len(empty)} queries have no target tokens, at positions {empty[:10].tolist()}: "
            "their mask is zero everywhere, so there is nothing to attribute. Leave them out."
        )


def _of_targets(
    logits_fn: LogitsFn, function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
) -> OutputFn:
    """An output function of a row's logits, its targets, which are tokens, and its mask."""
    check_function(logits_fn, "logits_fn", ("params", "row"))

    def of_row(params: Params, example: Example, key: Key) -> jax.Array:
        mask, targets = example["mask"], example["targets"]
        if jnp.ndim(mask) != 1:
            raise ValueError(f"a row of tokens is [t], and the mask of this one {list(mask.shape)}")
        if mask.dtype != bool:  # no mask, but one that is added to logits, or labels' filler
            mask = jnp.where(mask < 0, jnp.nan, mask)
        # Those that do not count may be anything, such as -100.
        asked = jnp.where(mask.astype(bool), targets, jnp.zeros_like(targets))
        logits = logits_fn(params, example)
        if jnp.ndim(logits) != 2 or len(logits) != len(mask):
            raise ValueError(
                f"logits_fn must map ONE row to logits [{len(mask)}, vocabulary], and returned "
                f"{list(jnp.shape(logits))}"
            )
        return function(logits, asked, mask)

    return of_row


def _log_odds(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of each target [t]: of p itself, 1 - p and all gradients are lost near 1."""
    logits = logits.astype(wide(logits.dtype))
    own = jnp.arange(logits.shape[-1])[None] == targets[:, None]
    others = jnp.where(own, -jnp.inf, logits)
    alone = (others == -jnp.inf).all(axis=-1)  # p is one, whatever the parameters are
    odds = _picked(logits, targets) - jax.nn.logsumexp(
        jnp.where(alone[:, None], 0, others), axis=-1
    )
    return jnp.where(alone, -math.log(jnp.finfo(logits.dtype).eps), odds)


def _picked(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit of each target [t]; NaN where it is no token."""
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    # Below zero they would count from the end of the vocabulary.
    return jnp.where(targets < 0, jnp.nan, picked)


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    count = mask.sum()
    return _summed(values, mask) / jnp.where(count > 0, count, 1)


def _summed(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum over targets that count; `where`, since a masked value may be infinite."""
    return jnp.sum(jnp.where(mask.astype(bool), values, 0) * mask)


def _checked(documents: Sequence[Sequence[int]], vocabulary: int) -> list[np.ndarray]:
    if not isinstance(documents, Mapping) and not hasattr(documents, "__getitem__"):
        documents = list(documents)  # read more than once
    if isinstance(documents, Mapping) or any(isinstance(each, Mapping) for each in documents):
        call = "[each['input_ids'] for each in documents]"
        call = "documents['input_ids']" if isinstance(documents, Mapping) else call
        raise TypeError(
            f"documents must be lists of token ids, got mappings: pass their ids alone, {call}."
        )
    first: Any = next(iter(documents), ())
    if first is None or isinstance(first, int) or getattr(first, "ndim", 1) == 0:
        raise TypeError(
            f"documents must be lists of token ids, and the first is {first!r:.40}: if those are "
            "ids of ONE document, pass [document]."
        )
    words = [n for n, document in enumerate(documents) if np.asarray(document).dtype.kind in "USO"]
    if words:
        raise TypeError(
            f"documents must be lists of token ids, and document {words[0]} is text. Tokenize it "
            "first: [tokenizer.encode(text) for text in texts]."
        )
    arrays, vocabulary = list(map(np.asarray, documents)), whole_number("vocabulary", vocabulary)
    for number, document in enumerate(arrays):
        if not document.size:
            raise ValueError(f"Document {number} is empty: leave it out.")
        if document.ndim != 1 or document.dtype.kind not in "iu":
            raise TypeError(
                f"Document {number} must be a list of token ids, whole numbers, got "
                f"{document.dtype} {list(document.shape)}."
            )
        wrong = document[(document < 0) | (document >= vocabulary)]
        if len(wrong):
            raise ValueError(
                f"Document {number} holds token {wrong[0]}, and the model knows 0 to "
                f"{vocabulary - 1}: the tokenizer is another model's."
            )
    return [document.astype(np.int64) for document in arrays]
