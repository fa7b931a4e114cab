"""Queries with their proponents and opponents, as HTML."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxattr.markup import escaped, isolated, number
from jaxattr.reports.examples import LONGEST_TEXT, Fields, Item, Picture, Text, Tokens
from jaxattr.reports.pictures import Encoder
from jaxattr.reports.tokens import Pair

LEVELS = 8
"""Shades of a token's colour."""

TOKENS = 100_000
"""Tokens of a page, some 30 bytes each; more only if it has so many rows that `FEWEST` are more."""

FEWEST = 24
"""Tokens that are shown of a row, however many rows there are."""

OPEN = 3
"""Texts of each kind that are shown at once; others are folded away."""

Contributions = Mapping[Pair, np.ndarray]


class Query(NamedTuple):
    """A query and what it found.

    Attributes:
      position: of the query.
      item: the query itself; None if features were given in its place.
      prediction: what the model said, or None.
      finite: whether it has a gradient that is.
      proponents: strongest first.
      opponents: strongest first; None where scores have no sign.
    """

    position: int
    item: Item | None
    prediction: str | None
    finite: bool
    proponents: tuple[Pair, ...]
    opponents: tuple[Pair, ...] | None


@dataclasses.dataclass(frozen=True)
class Cards:
    """Makes the cards of a page.

    Attributes:
      train: items of the training examples that are shown.
      encode: of pictures.
      decode: the text of a token, or None.
      by_query: contributions of the queries' tokens.
      by_train: contributions of the training examples' tokens.
      tables: whether examples are shown as tables of their fields, for want of a better way.
      most: tokens of a row that are shown.
    """

    train: Mapping[int, Item]
    encode: Encoder
    decode: Callable[[int], str] | None
    by_query: Contributions
    by_train: Contributions
    tables: bool
    most: int

    def store(self) -> str:
        """Returns the pictures of training examples, each once, for `<use>` to refer to."""
        made = [
            f'<image id="t{number}" width="{_width(shown)}" height="{_height(shown)}" '
            f'href="{self.encode.address(shown.pixels)}"/>'
            for number, item in self.train.items()
            if isinstance(shown := item.shown, Picture)
        ]
        return f'<svg class="store" aria-hidden="true"><defs>{"".join(made)}</defs></svg>'

    def query(self, query: Query) -> str:
        """Returns the card of one query.

        Args:
          query: to be shown.
        """
        scores = [pair.score for pair in (*query.proponents, *(query.opponents or ()))]
        largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0) or 1.0
        label = "" if query.item is None or query.item.label is None else query.item.label
        return (
            f'<article class="{_kind(query)}" id="q{query.position}" tabindex="-1" '
            f'data-at="{query.position}" data-label="{escaped(label)}" '
            f'data-top="{_first(query.proponents)}" data-low="{_first(query.opponents)}" '
            f'aria-labelledby="h{query.position}"><div class="query">{self._head(query)}</div>'
            f'<div class="found">{self._found(query, largest)}</div></article>'
        )

    def _head(self, query: Query) -> str:
        lines = [f'<h3 id="h{query.position}">Query {query.position}</h3>']
        if query.item is None:
            lines.append('<p class="none">Not shown: features were given in its place.</p>')
        else:
            lines.append(self._whole(query.item, f"query {query.position}"))
        said = [("label", None if query.item is None else query.item.label)]
        said += [("prediction", query.prediction)]
        pairs = "".join(
            f"<dt>{name}</dt><dd>{isolated(text)}</dd>" for name, text in said if text is not None
        )
        return "".join(lines) + (f"<dl>{pairs}</dl>" if pairs else "")

    def _found(self, query: Query, largest: float) -> str:
        if not query.finite:
            return (
                '<p class="lost"><strong>Not finite.</strong> The gradient of this query is not '
                "finite, so nothing is ranked for it.</p>"
            )
        if query.opponents is None:
            return self._side(query, query.proponents, "pro", "Most influential", largest)
        return self._side(query, query.proponents, "pro", "Proponents", largest) + self._side(
            query, query.opponents, "opp", "Opponents", largest
        )

    def _side(
        self, query: Query, pairs: Sequence[Pair], kind: str, name: str, largest: float
    ) -> str:
        sign = "positive" if kind == "pro" else "negative"
        if not pairs:
            none = f"None: no training example has a {sign} score."
            return _section(kind, name, f'<p class="none">{none}</p>')
        tiny = all(isinstance(self.train[pair.train].shown, Picture) for pair in pairs)
        entries = [self._entry(query, pair, largest) for pair in pairs]
        if tiny:
            body = f'<ol class="grid">{"".join(entries)}</ol>'
        else:
            body = f'<ol class="list">{"".join(entries[:OPEN])}</ol>'
            if rest := entries[OPEN:]:
                folded = f'<ol class="list" start="{OPEN + 1}">{"".join(rest)}</ol>'
                body += f"<details><summary>{len(rest)} more</summary>{folded}</details>"
        return _section(kind, name, body)

    def _entry(self, query: Query, pair: Pair, largest: float) -> str:
        item = self.train[pair.train]
        share = min(abs(pair.score) / largest, 1.0) if math.isfinite(pair.score) else 1.0
        alike = query.item is not None and query.item.label == item.label
        label = ""
        if item.label is not None:
            title = "" if alike else ' title="another label than the query\'s"'
            kind = "label" if alike else "label other"
            label = f'<span class="{kind}"{title}>{isolated(item.label)}</span>'
        return (
            f'<li class="entry"><div class="meta">{label}<span class="id">#{pair.train}</span>'
            f'<span class="score">{number(pair.score, "+")}</span></div>'
            f'<div class="bar"><i style="width:{100 * share:.0f}%"></i></div>'
            f"{self._example(query, pair, item)}</li>"
        )

    def _example(self, query: Query, pair: Pair, item: Item) -> str:
        if isinstance(item.shown, Picture):
            name = f"training example {pair.train}"
            name += "" if item.label is None else f", label {escaped(item.label)}"
            shown = item.shown
            return (
                f'<svg class="{_grain(shown)}" viewBox="0 0 {_width(shown)} {_height(shown)}" '
                f'role="img" aria-label="{name}"><use href="#t{pair.train}"/></svg>'
            )
        if not isinstance(item.shown, Tokens):
            return self._whole(item, f"training example {pair.train}")
        parts = [self._tokens(item.shown, self.by_train.get(pair))]
        asking = None if query.item is None else query.item.shown
        if pair in self.by_query and isinstance(asking, Tokens):
            asked = self._tokens(asking, self.by_query[pair])
            parts.append(f'<div class="asked"><span>in the query</span>{asked}</div>')
        return "".join(parts)

    def _whole(self, item: Item, name: str) -> str:
        shown = item.shown
        if isinstance(shown, Picture):
            alt = name if item.label is None else f"{name}, label {item.label}"
            return (
                f'<img class="{_grain(shown)}" src="{self.encode.address(shown.pixels)}" '
                f'alt="{escaped(alt)}" width="{_width(shown)}" height="{_height(shown)}">'
            )
        if isinstance(shown, Text):
            return f'<div class="text" dir="auto">{escaped(shortened(shown.text))}</div>'
        if isinstance(shown, Fields):
            rows = "".join(
                f'<tr><th scope="row">{isolated(key)}</th>'
                f"<td>{isolated(shortened(value))}</td></tr>"
                for key, value in shown.rows
            )
            return f'<table class="fields">{rows}</table>'
        return self._tokens(shown, None)

    def _tokens(self, shown: Tokens, values: np.ndarray | None) -> str:
        return coloured(*pieces(shown.row, self.decode), values, self.most)


def most_tokens(queries: Sequence[Query], by_query: Contributions) -> int:
    """Returns how many tokens of a row are shown, so that the page stays small.

    Args:
      queries: all that are on the page.
      by_query: contributions of the queries' tokens; each is a row of its own.
    """
    pairs = sum(len(query.proponents) + len(query.opponents or ()) for query in queries)
    return max(FEWEST, TOKENS // (len(queries) + pairs + len(by_query)))


def pieces(
    row: Mapping[str, np.ndarray], decode: Callable[[int], str] | None
) -> tuple[list[str], np.ndarray]:
    """Returns the texts of a row's tokens, and which of them are asked for.

    Args:
      row: `inputs`, `targets`, `mask`, each [t].
      decode: the text of a token; None for its number.

    Returns:
      Texts of the first input and of all targets up to the last that counts; and bool, as many.
    """
    counted = np.asarray(row["mask"]).astype(bool)
    last = int(np.flatnonzero(counted)[-1]) + 1 if counted.any() else 0
    # Targets that do not count may be filler, such as -100: what is read there says the token.
    said = np.append(row["inputs"][1:], row["targets"][-1:])
    said = np.where(counted, row["targets"], said)[:last]
    ids = [int(row["inputs"][0]), *map(int, said)]
    texts = [f"{i} " if decode is None else str(decode(i)) for i in ids]
    return texts, np.concatenate([[False], counted[:last]])


def coloured(
    texts: Sequence[str], counted: np.ndarray, values: np.ndarray | None, most: int = TOKENS
) -> str:
    """Makes tokens coloured by their contributions.

    Args:
      texts: of the first token that is read and of each target.
      counted: which are asked for, bool, as many.
      values: contribution of each target, or None.
      most: tokens that are shown: those in a row that contribute most; else, that are asked for.

    Returns:
      HTML, which says how many tokens are left out. Pages hold many tokens, so only strong
      colours have their number to point at.
    """
    shares = np.zeros(len(texts))
    if values is not None:
        shares[1:] = values[: len(texts) - 1]
    largest = np.abs(shares).max() or 1.0
    levels = np.rint(LEVELS * np.sqrt(np.abs(shares) / largest)).astype(int)
    levels[np.abs(shares) < 0.01 * largest] = 0
    some = counted[1:].any() and not counted[1:].all()
    spans = []
    for text, level, share, asked in zip(texts, levels, shares, counted, strict=True):
        kinds = f"{'p' if share > 0 else 'n'}{level}" if level else ""
        kinds += " u" if some and asked else ""
        title = f' title="{number(share, "+")}"' if level >= LEVELS // 2 else ""
        shown = escaped(text)
        spans.append(f'<i class="{kinds.strip()}"{title}>{shown}</i>' if kinds else shown)
    start, stop = _strongest(shares if values is not None else counted, most)
    shown = "".join(spans[start:stop])
    before = f"({start:,} tokens before) ... " if start else ""
    after = f" ... ({len(spans) - stop:,} more tokens)" if stop < len(spans) else ""
    return f'<div class="text tokens" dir="auto">{before}{shown}{after}</div>'


def _strongest(strengths: np.ndarray, most: int) -> tuple[int, int]:
    """The ends of the stretch with the largest sum of sizes; of equal ones that in the middle."""
    if len(strengths) <= most:
        return 0, len(strengths)
    sums = np.convolve(np.abs(strengths), np.ones(most), "valid")
    best = np.flatnonzero(sums >= 0.999 * sums.max())
    # Where all are equal, a text begins at its beginning.
    start = int(best[len(best) // 2]) if len(best) < len(sums) else 0
    return start, start + most


def shortened(text: str) -> str:
    """Returns a text of a length that a page can bear.

    Args:
      text: of any length.
    """
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} ... ({len(text) - LONGEST_TEXT:,} more characters)"


def _width(shown: Picture) -> int:
    return int(shown.pixels.shape[1])


def _height(shown: Picture) -> int:
    return int(shown.pixels.shape[0])


def _grain(shown: Picture) -> str:
    """Few pixels are shown as they are, and not blurred."""
    return "pic coarse" if max(shown.pixels.shape[:2]) <= 64 else "pic"


def _section(kind: str, name: str, body: str) -> str:
    return f'<section class="side {kind}"><h4>{name}</h4>{body}</section>'


def _kind(query: Query) -> str:
    """Words are read across the page, and stand above what they found."""
    words = query.item is not None and isinstance(query.item.shown, Text | Tokens)
    return "card words" if words else "card"


def _first(pairs: Sequence[Pair] | None) -> str:
    """The strongest score, as JavaScript reads it; nothing if there is none."""
    return f"{pairs[0].score:.9g}".replace("inf", "Infinity") if pairs else ""
