"""Invented facts, each stated in one document, to be asked for: the source is known."""

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


class Facts(NamedTuple):
    """Facts with their documents.

    Attributes:
      documents: texts to put into the corpus: first one source per fact, then distractors.
      prompts: the beginning of a sentence about each fact.
      answers: what completes it.
    """

    documents: list[str]
    prompts: list[str]
    answers: list[str]


def invent(count: int, seed: int = 0) -> Facts:
    """Invents facts about names that no corpus has.

    Args:
      count: number of facts.
      seed: of the names.

    Returns:
      The facts; document i is the only one that states fact i.
    """
    names = iter(_names(2 * count, np.random.default_rng(seed)))
    sources, distractors, prompts, answers = [], [], [], []
    for number in range(count):
        source, (prompt, answer) = RELATIONS[number % len(RELATIONS)]
        filled = {"a": next(names), "b": next(names)}
        sources.append(source.format(**filled))
        distractors.append(DISTRACTOR.format(**filled))
        prompts.append(prompt.format(**filled))
        answers.append(answer.format(**filled))
    return Facts(sources + distractors, prompts, answers)


def _names(count: int, numbers: np.random.Generator) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        parts = [*numbers.choice(SYLLABLES, 2, replace=False), numbers.choice(ENDINGS)]
        names["".join(map(str, parts)).capitalize()] = None
    return list(names)
