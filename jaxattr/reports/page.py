"""The page: one file that needs nothing else, reads without scripts, and prints."""

import base64
import hashlib
import importlib.resources
import re
import string
from collections.abc import Sequence

from jaxattr.markup import escaped, isolated
from jaxattr.reports.cards import Cards, Query
from jaxattr.reports.facts import Facts, Group


def page(title: str, facts: Facts, queries: Sequence[Query], cards: Cards) -> str:
    """Makes the page.

    Args:
      title: of the page.
      facts: what stands around the queries.
      queries: in their order.
      cards: that show them.

    Returns:
      HTML. Text of users is escaped; a policy in the page forbids every script but its own, and
      every request.
    """
    style, script = _file("page.css"), _file("page.js")
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tiles = "".join(
        f"<div><dt>{escaped(what)}</dt><dd>{escaped(value)}</dd><dd>{escaped(more)}</dd></div>"
        for what, value, more in facts.tiles
    )
    sources = "".join(
        f"<dt>{escaped(what)}</dt><dd>{isolated(value)}</dd>" for what, value in facts.provenance
    )
    # Lines of the template are joined: a space between two elements would be seen.
    template = string.Template("".join(map(str.strip, _file("page.html").splitlines())))
    return template.substitute(
        seal=seal,
        style=style,
        script=script,
        title=escaped(title),
        heading=isolated(title),
        method=isolated(facts.method),
        weighting=escaped(facts.weighting),
        sign=_sign(facts),
        tiles=tiles,
        warnings=_warnings(facts),
        weights=_weights(facts),
        legend=_legend(queries, cards),
        store=cards.store(),
        cards="".join(cards.query(query) for query in queries),
        sources=sources,
        note=f'<p class="hint">{cards.encode.note}</p>' if cards.encode.note else "",
        cite=_citation(facts.citation),
        **_choices(queries),
    )


def _file(name: str) -> str:
    return importlib.resources.files("jaxattr.reports").joinpath(name).read_text("utf-8")


def _sign(facts: Facts) -> str:
    if facts.link == "square":
        return (
            'The training examples with the <b class="pro">largest scores</b> for each query. '
            "Scores of this method are squares: they say how much an example matters, and not "
            "which way. They compare within a query, not between queries."
        )
    if facts.compares:
        return (
            'The training examples that are <b class="pro">most like</b> each query, and, of those '
            'with negative scores, <b class="opp">least like</b> it. This is a baseline: it '
            "compares examples, and knows nothing of what training on them did."
        )
    return (
        'Training on a <b class="pro">proponent</b> made the model do more of what it did on the '
        'query; training on an <b class="opp">opponent</b>, less. Scores compare within a query, '
        "not between queries."
    )


def _warnings(facts: Facts) -> str:
    items = "".join(f"<li>{escaped(text)}</li>" for text in facts.warnings)
    if not items:
        return ""
    return (
        '<section class="warnings" aria-label="Warnings"><h2>Look at this first</h2>'
        f"<ul>{items}</ul></section>"
    )


def _weights(facts: Facts) -> str:
    known = facts.groups[0].share is not None
    largest = max(group.weight for group in facts.groups) or 1.0
    widest = max(max(group.share or 0, group.start_share or 0) for group in facts.groups) or 1.0
    rows = "".join(_group(group, largest, widest, known) for group in facts.groups)
    headings = ["group", "weight", *(["share of the scores"] if known else []), "parameters"]
    head = "".join(
        f'<th scope="col" data-by="{place}">{name}</th>' for place, name in enumerate(headings)
    )
    gain = "" if facts.gain is None else f'<p class="gain">{escaped(facts.gain)}</p>'
    tick = "The tick in a weight's bar is a weight of one." + (
        " The tick in a share's bar is where learning started." if known else ""
    )
    opened = " open" if facts.weighting != "uniform weights" else ""
    return (
        f'<details class="panel" id="weights"{opened}><summary><h2>Weights of '
        f"{len(facts.groups)} parameter groups</h2></summary>{gain}"
        f'<p class="hint">{tick}</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Weights"><table class="weights"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_excluded(facts)}</details>"
    )


def _group(group: Group, largest: float, widest: float, known: bool) -> str:
    weight = _bar(group.weight / largest, 1 / largest, "w", f"{group.weight:.3f}")
    cells = f'<td data-v="{group.weight:.6g}">{weight}</td>'
    if known:
        share, start = group.share or 0.0, group.start_share or 0.0
        made = _bar(share / widest, start / widest, "s", f"{100 * share:.1f} %")
        cells += f'<td data-v="{share:.6g}">{made}</td>'
    return (
        f'<tr><th scope="row">{isolated(group.name)}</th>{cells}'
        f'<td class="num" data-v="{group.parameters}">{group.parameters:,}</td></tr>'
    )


def _bar(share: float, tick: float, kind: str, text: str) -> str:
    mark = f'<b style="left:{100 * tick:.1f}%"></b>' if tick <= 1 else ""
    return (
        f'<span class="value">{text}</span><span class="track {kind}">'
        f'<i style="width:{100 * min(share, 1.0):.1f}%"></i>{mark}</span>'
    )


def _excluded(facts: Facts) -> str:
    if facts.excluded is None:
        return '<p class="hint">Which parameters are in no group is not known here.</p>'
    if not facts.excluded:
        return '<p class="hint">Every parameter is in a group.</p>'
    items = "".join(f"<li>{isolated(leaf)}: {escaped(why)}</li>" for leaf, why in facts.excluded)
    return (
        f"<details><summary>{len(facts.excluded)} parameter arrays are in no group</summary>"
        f"<ul>{items}</ul></details>"
    )


def _choices(queries: Sequence[Query]) -> dict[str, str]:
    """What queries can be filtered and sorted by, of what some have and others have not."""
    labels = {query.item.label for query in queries if query.item is not None}
    known = sorted((label for label in labels if label is not None), key=_in_order)
    found = dict.fromkeys(("labels", "by_low", "by_label"), "")
    if len(known) > 1:
        options = "".join(f'<option value="{escaped(x)}">{escaped(x)}</option>' for x in known)
        every = '<option value="">all</option>'
        found["labels"] = f'<label>Label <select id="label">{every}{options}</select></label>'
        found["by_label"] = '<option value="label">label</option>'
    if any(query.opponents is not None for query in queries):
        found["by_low"] = '<option value="low">strongest opponent</option>'
    return found


def _legend(queries: Sequence[Query], cards: Cards) -> str:
    """What the marks in the cards mean, of those that are there."""
    labels = any(query.item is not None and query.item.label is not None for query in queries)
    said = ["Labels with a dotted line differ from the query's."] if labels else []
    if cards.by_query or cards.by_train:
        said += ["Blue tokens raise the score, orange ones lower it; the stronger, the more."]
        said += ["Underlined tokens are asked for, where others are given."]
    if cards.tables:
        shown = "Examples are shown as tables of their fields"
        said += [f"{shown}: ja.report(..., render=) shows them as pictures or texts instead."]
    return f'<p class="legend">{" ".join(said)}</p>' if said else ""


def _in_order(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, before words."""
    whole = re.fullmatch(r"-?[0-9]{1,18}", label) is not None
    return (not whole, int(label) if whole else 0, label)


def _citation(text: str) -> str:
    cite = f"<details><summary>Cite the method</summary><pre>{escaped(text)}</pre></details>"
    return cite if text else ""
