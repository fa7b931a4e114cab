"""A page: a query with the documents that taught it, each token coloured by its influence."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    of_tokens = ja.score(index, language.token_features(index, queries), weights=weights)
    by_query = np.asarray(of_tokens).reshape(q, t, -1)
    top = ja.top_k(index, queries, k=k, weights=weights)
    phi = ja.query_features(index, queries)
    found = []
    for row, ids in enumerate(np.asarray(top.ids)):
        documents = {name: x[ids] for name, x in corpus.train.items()}
        flat = {
            name: np.concatenate([np.asarray(part) for part in parts])
            for name, parts in _tokens_of(documents).items()
        }
        tokens = ja.build_index(method, params, flat, batch_size=128)
        query = phi._replace(features=phi.features[row : row + 1], non_finite=np.array([], int))
        by_document = np.asarray(ja.score(tokens, query, weights=weights)).reshape(k, t)
        asked = {name: x[row] for name, x in queries.items()}
        found.append(
            [
                Found(
                    float(top.scores[row, place]),
                    coloured(corpus.tokenizer, asked, by_query[row, :, identity]),
                    coloured(
                        corpus.tokenizer,
                        {name: x[place] for name, x in documents.items()},
                        by_document[place],
                    ),
                )
                for place, identity in enumerate(ids)
            ]
        )
    return found


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


def write(path: Path, content: str) -> None:
    """Writes a page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _tokens_of(documents: Rows) -> dict[str, list[Any]]:
    rows = [
        language.tokens_of({name: x[i] for name, x in documents.items()})
        for i in range(len(documents["mask"]))
    ]
    return {name: [row[name] for row in rows] for name in documents}


def _tokens(text: Coloured) -> str:
    largest = np.abs(text.values).max() or 1.0
    spans = []
    for piece, value in zip(text.pieces, text.values, strict=True):
        strength = abs(float(value)) / largest
        colour = f"rgba({'9,105,218' if value > 0 else '209,36,47'},{0.75 * strength:.2f})"
        shown = html.escape(piece) or "&middot;"
        spans.append(f'<span style="background:{colour}" title="{value:.3g}">{shown}</span>')
    return f"<pre>{''.join(spans)}</pre>"
