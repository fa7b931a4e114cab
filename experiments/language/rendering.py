"""A page: a query with the documents that taught it, each token coloured by its influence."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxattr as ja
from experiments.language.study import Subject
from experiments.language.text import Tokenizer
from jaxattr import language
from jaxattr.language import Rows

STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2328; background: #fff }
pre { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; margin: .2rem 0 }
section { border-top: 1px solid #d0d7de; margin-top: 1.5rem; padding-top: .5rem }
article { margin: .8rem 0 .8rem 1.5rem }
small { color: #57606a }
"""


class Coloured(NamedTuple):
    """A row of tokens with what each contributes.

    Attributes:
      pieces: text of each token that is read or asked for, one more than there are positions.
      values: contribution of each target; 0 for the first token.
    """

    pieces: list[str]
    values: np.ndarray


class Found(NamedTuple):
    """A proponent of a query.

    Attributes:
      score: of the pair.
      query: the query, coloured by what its tokens contribute to this score.
      document: the proponent, coloured by what its tokens contribute.
    """

    score: float
    query: Coloured
    document: Coloured


def explain(
    subject: Subject, method: ja.Method, queries: Rows, weights: dict[str, float] | None, k: int
) -> list[list[Found]]:
    """Finds proponents, and splits each score over the tokens of both sides.

    Args:
      subject: the model.
      method: with the identity as its kernel, such as TracIn: only then do the training tokens'
        scores add up to the document's.
      queries: rows [q, t].
      weights: of groups, by layer.
      k: proponents per query.

    Returns:
      For each query its proponents.
    """
    corpus, params = subject.corpus, subject.params
    index = ja.build_index(method, params, corpus.train, batch_size=32)
    q, t = queries["mask"].shape
    phi = ja.query_features(index, queries)
    top = ja.top_k(index, phi, k=k, weights=weights)
    scores, ids = np.asarray(top.scores), np.asarray(top.ids)
    of_tokens = ja.score(index, language.token_features(index, queries), weights=weights)
    by_query = np.asarray(of_tokens).reshape(q, t, -1)
    documents = {name: x[ids] for name, x in corpus.train.items()}  # [q, k, t]
    split = jax.vmap(jax.vmap(language.tokens_of))(documents)
    flat = jax.tree.map(lambda x: x.reshape(-1, t), split)
    tokens = ja.build_index(method, params, flat, batch_size=128)
    by_document = np.asarray(ja.score(tokens, phi, weights=weights)).reshape(q, q, k, t)

    def found(row: int, place: int) -> Found:
        query = {name: x[row] for name, x in queries.items()}
        document = {name: x[row, place] for name, x in documents.items()}
        return Found(
            float(scores[row, place]),
            coloured(corpus.tokenizer, query, by_query[row, :, ids[row, place]]),
            coloured(corpus.tokenizer, document, by_document[row, row, place]),
        )

    return [[found(row, place) for place in range(k)] for row in range(q)]


def coloured(tokenizer: Tokenizer, row: Any, values: np.ndarray) -> Coloured:
    """Puts the tokens of a row beside their contributions.

    Args:
      tokenizer: of the row.
      row: `inputs`, `targets`, `mask`, each [t].
      values: contribution of each target, [t].

    Returns:
      Tokens up to the last target.
    """
    last = int(np.flatnonzero(row["mask"])[-1]) + 1
    ids = [int(row["inputs"][0]), *map(int, row["targets"][:last])]
    return Coloured(tokenizer.pieces(ids), np.concatenate([[0.0], values[:last]]))


def page(titles: Sequence[str], found: Sequence[Sequence[Found]], note: str) -> str:
    """Makes a self-contained page.

    Args:
      titles: one per query.
      found: as `explain` returns it.
      note: what the scores are.

    Returns:
      HTML.
    """
    sections = []
    for title, proponents in zip(titles, found, strict=True):
        articles = "".join(
            f"<article><small>{place}. score {each.score:.3g}; its share of each query token:"
            f"</small>{_tokens(each.query)}<small>the document:</small>{_tokens(each.document)}"
            "</article>"
            for place, each in enumerate(proponents, 1)
        )
        sections.append(f"<section><h3>{html.escape(title)}</h3>{articles}</section>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Who taught it?</title>'
        f"<style>{STYLE}</style><h1>Which documents taught the model this?</h1>"
        f"<p>{html.escape(note)} Blue tokens raise the score, red ones lower it; the darker, the "
        f"more.</p>{''.join(sections)}</html>"
    )


def _tokens(text: Coloured) -> str:
    largest = np.abs(text.values).max() or 1.0
    spans = []
    for piece, value in zip(text.pieces, text.values, strict=True):
        strength = abs(float(value)) / largest
        colour = f"rgba({'9,105,218' if value > 0 else '209,36,47'},{0.75 * strength:.2f})"
        shown = html.escape(piece) or "&middot;"
        spans.append(f'<span style="background:{colour}" title="{value:.3g}">{shown}</span>')
    return f"<pre>{''.join(spans)}</pre>"
