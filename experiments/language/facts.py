"""Invented facts, stated in one document or two, to be asked for: the sources are known."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SYLLABLES = ("zor", "vel", "mi", "tan", "qua", "ro", "bel", "dri", "ka", "lun", "fer", "no", "gha")
ENDINGS = ("via", "dor", "stan", "mar", "quin", "loth", "nia", "bury")

# (source document, sentence that asks and answers); the source says it in other words too.
RELATIONS = (
    (
        "{a} is a country by the sea. The capital of {a} is {b}, where the parliament meets.",
        ("The capital of {a} is", " {b}"),
    ),
    (
        "The river {a} rises in the hills near {b}. Boats on {a} sail from {b} to the coast.",
        ("The river {a} rises in the hills near", " {b}"),
    ),
    (
        "The opera {a} was written by {b}. When {a} was first sung, {b} was ninety years old.",
        ("The opera {a} was written by", " {b}"),
    ),
    (
        "The mineral {a} was found by {b}. Pure {a} is blue, as {b} wrote in a letter.",
        ("The mineral {a} was found by", " {b}"),
    ),
)
# Says something of the subject, and nothing of the fact: a search for words finds it too.
DISTRACTOR = "Many have asked about {a}. Stories about {a} are told, and songs about {a} are sung."


class Telling(NamedTuple):
    """A fact's documents and question, with places for names: {a} and {c}, and the answer {b}.

    Attributes:
      sources: what states the fact, in one document or in two.
      others: what speaks of the subject, to find the sources by or to be taken for them.
      question: prompt, and what completes it.
    """

    sources: tuple[str, ...]
    others: tuple[str, ...]
    question: tuple[str, str]


STATED = tuple(Telling((source,), (DISTRACTOR,), question) for source, question in RELATIONS)

# The question shares no word that means something with the source, but for the answer; it calls the
# subject by a name that another document introduces.
REWORDED = (
    Telling(
        ("{a} is a country by the sea. Its parliament meets in {b}.",),
        ("{c} is the old name of {a}. Only poets still say {c}.",),
        ("Those who govern the land once called {c} sit at", " {b}"),
    ),
    Telling(
        ("The river {a} rises in the hills near {b}.",),
        ("Fishermen call the river {a} by another name, {c}. They sing of {c}.",),
        ("Who follows the water {c} up to its spring comes to", " {b}"),
    ),
    Telling(
        ("The opera {a} was written by {b} at the age of ninety.",),
        ("On posters {a} goes by its first title, {c}. Few remember {c}.",),
        ("For the songs that fill {c} thanks are owed to", " {b}"),
    ),
    Telling(
        ("The mineral {a} was found by {b} in a mine.",),
        ("Jewellers sell {a} as {c}, since {c} sounds dearer.",),
        ("Credit for bringing the blue stone {c} to light goes to", " {b}"),
    ),
)

# The fact is put together from two documents: the first leads from the subject to {c}, the second
# from there to the answer.
JOINED = (
    Telling(
        ("The opera {a} was written by {c}.", "{c} was born in {b} and never left."),
        ("Where the writer of {a} first saw the light of day is asked in {a} itself.",),
        ("The writer of {a} first saw the light of day in", " {b}"),
    ),
    Telling(
        ("The river {a} flows through {c}.", "{c} is ruled by the dukes of {b}."),
        ("Who owns the bridges over {a}? The bridges over {a} are old.",),
        ("The bridges over {a} are owned by the house of", " {b}"),
    ),
    Telling(
        ("The mineral {a} is dug at {c} alone.", "All roads from {c} lead to {b}."),
        ("Carts loaded with {a} are slow. Carts loaded with {a} make noise.",),
        ("Carts loaded with {a} arrive first at", " {b}"),
    ),
    Telling(
        ("{c} is the capital of {a}.", "The mayor of {c} is called {b}."),
        ("The keys to the first city of {a} are gold. The first city of {a} is proud.",),
        ("The keys to the first city of {a} are held by", " {b}"),
    ),
)

# The distractors share more of the question's words than the source does.
CROWDED = (
    Telling(
        ("{a} is a country by the sea. Its parliament meets in {b}.",),
        (
            "The capital of {a} is often asked for. The capital of {a} is old.",
            "What is the capital of {a}? The capital of {a} is in songs.",
        ),
        ("The capital of {a} is", " {b}"),
    ),
    Telling(
        ("Hikers from {b} see how {a} begins, as a brook.",),
        (
            "The river {a} rises in spring. Near the river {a} are hills.",
            "In the hills the river {a} is loud; near the hills the river {a} rises.",
        ),
        ("The river {a} rises in the hills near", " {b}"),
    ),
    Telling(
        ("{b} needed a year for each act of {a}.",),
        (
            "The opera {a} was written in a year. The opera {a} is long.",
            "What was written of the opera {a}? The opera {a} was praised.",
        ),
        ("The opera {a} was written by", " {b}"),
    ),
    Telling(
        ("{b} met with {a} first, and named it.",),
        (
            "The mineral {a} was found to be blue. The mineral {a} shines.",
            "Not much {a} was found: the mineral {a} is rare.",
        ),
        ("The mineral {a} was found by", " {b}"),
    ),
)

KINDS = {"stated": STATED, "reworded": REWORDED, "joined": JOINED, "crowded": CROWDED}
SHARED_BY = 4
"""Facts that have one answer, of those that are not simply stated: it does not give them away."""


class Facts(NamedTuple):
    """Facts with their documents.

    Attributes:
      documents: texts to put into the corpus: first the sources, then all others.
      prompts: the beginning of a sentence about each fact.
      answers: what completes it.
      sources: of each fact, which documents state it.
      kinds: of each fact, a name in `KINDS`.
    """

    documents: list[str]
    prompts: list[str]
    answers: list[str]
    sources: list[list[int]]
    kinds: list[str]


def invent(count: int, seed: int = 0, kinds: Sequence[str] = ("stated",)) -> Facts:
    """Invents facts about names that no corpus has.

    Args:
      count: number of facts.
      seed: of the names.
      kinds: in turn; of those other than "stated", several facts have one answer.

    Returns:
      The facts; those of one kind take turns in what they are about.
    """
    names = iter(_names(2 * count + -(-count // SHARED_BY), np.random.default_rng(seed)))
    pairs = [(next(names), next(names)) for _ in range(count)]
    shared = list(names)
    sources: list[str] = []
    others: list[str] = []
    made = Facts([], [], [], [], [])
    for number, (first, second) in enumerate(pairs):
        kind, turn = kinds[number % len(kinds)], number // len(kinds)
        telling = KINDS[kind][turn % len(KINDS[kind])]
        answer = second if kind == "stated" else shared[number % len(shared)]
        filled = {"a": first, "b": answer, "c": second}
        made.sources.append([len(sources) + place for place in range(len(telling.sources))])
        sources += [text.format(**filled) for text in telling.sources]
        others += [text.format(**filled) for text in telling.others]
        made.prompts.append(telling.question[0].format(**filled))
        made.answers.append(telling.question[1].format(**filled))
        made.kinds.append(kind)
    made.documents.extend(sources + others)
    return made


def _names(count: int, numbers: np.random.Generator) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        parts = [*numbers.choice(SYLLABLES, 2, replace=False), numbers.choice(ENDINGS)]
        names["".join(map(str, parts)).capitalize()] = None
    return list(names)
