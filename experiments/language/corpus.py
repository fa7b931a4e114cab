"""The parts of a corpus: what is attributed to, what is asked, and what the model grew up on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.language import facts
from experiments.language.text import Tokenizer
from jaxattr import language
from jaxattr.language import Rows


class Corpus(NamedTuple):
    """A corpus in rows.

    Attributes:
      tokenizer: of all texts.
      background: packed rows, for pretraining.
      train: one row per document that scores are for; sources and distractors of facts come last.
      texts: of those documents.
      learning: held-out documents to learn weights from.
      evaluation: other held-out documents, to measure on.
      questions: a row per fact, whose answer alone is asked for.
      sentences: prompt and answer of each fact, as text.
      prompts: the prompts alone.
      sources: bool [facts, n], which documents state the fact.
      kinds: of each fact, as in `facts.KINDS`.
    """

    tokenizer: Tokenizer
    background: Rows
    train: Rows
    texts: list[str]
    learning: Rows
    evaluation: Rows
    questions: Rows
    sentences: list[str]
    prompts: list[str]
    sources: np.ndarray
    kinds: list[str]


def assemble(
    texts: list[str],
    tokenizer: Tokenizer,
    *,
    context: int,
    train: int,
    queries: int,
    known: int,
    kinds: Sequence[str] = ("stated",),
) -> Corpus:
    """Splits texts, and puts invented facts among those to train on.

    Args:
      texts: documents, in random order, none twice.
      tokenizer: turns them into tokens.
      context: tokens per row; longer documents are cut.
      train: documents to attribute to, facts included.
      queries: to learn weights from, and as many others to measure on.
      known: facts.
      kinds: of facts, as in `facts.KINDS`.

    Returns:
      The corpus.

    Raises:
      ValueError: if there are too few documents.
    """
    invented = facts.invent(known, kinds=kinds)
    plain = train - len(invented.documents)
    needed = plain + 2 * queries + 1
    if plain < 1 or len(texts) < needed:
        raise ValueError(
            f"{train} training documents, of which {len(invented.documents)} are about invented "
            f"facts, and 2 x {queries} queries need at least {needed} documents; got {len(texts)}."
        )
    chosen = [*texts[2 * queries : 2 * queries + plain], *invented.documents]

    def rows(documents: list[str]) -> Rows:
        encoded = [tokenizer.encode(document) for document in documents]
        return language.rows(encoded, context, vocabulary=tokenizer.vocabulary, truncate=True)

    sentences = [f"{p}{a}" for p, a in zip(invented.prompts, invented.answers, strict=True)]
    sources = np.zeros((known, train), bool)
    for row, places in enumerate(invented.sources):
        sources[row, plain + np.array(places)] = True
    background = [tokenizer.encode(text) for text in texts[2 * queries + plain :]]
    return Corpus(
        tokenizer,
        language.packed(background, context, vocabulary=tokenizer.vocabulary),
        rows(chosen),
        chosen,
        rows(texts[:queries]),
        rows(texts[queries : 2 * queries]),
        _questions(invented, sentences, tokenizer, context),
        sentences,
        invented.prompts,
        sources,
        invented.kinds,
    )


def _questions(
    invented: facts.Facts, sentences: list[str], tokenizer: Tokenizer, context: int
) -> Rows:
    # Without the mark at its end: a document goes on after the answer.
    ended = len(tokenizer.encode("")) // 2
    whole = [tokenizer.encode(sentence) for sentence in sentences]
    given = [len(tokenizer.encode(prompt)) - ended for prompt in invented.prompts]
    answered = [ids[: len(ids) - ended] for ids in whole]
    return language.rows(answered, context, vocabulary=tokenizer.vocabulary, prompts=given)
