"""What does not look into the model: BM25, and the similarity of embedded texts."""

import logging
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

WORDS = r"(?u)\b\w+\b"


def bm25(documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """Scores of BM25 over words.

    Args:
      documents: texts.
      queries: texts.

    Returns:
      Float [q, n].
    """
    import bm25s  # starts JAX when it is imported, before the number of its devices is set

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    retriever = bm25s.BM25()
    tokens = [
        bm25s.tokenize(list(texts), stopwords=None, token_pattern=WORDS, show_progress=False)
        for texts in (documents, queries)
    ]
    retriever.index(tokens[0], show_progress=False)
    words = {number: word for word, number in tokens[1].vocab.items()}
    asked = ([words[number] for number in ids] for ids in tokens[1].ids)
    return np.stack([retriever.get_scores(words) for words in asked])


def embeddings(documents: Sequence[str], queries: Sequence[str], size: int = 256) -> np.ndarray:
    """Cosines of texts embedded by latent semantic analysis of words and pairs of words.

    Args:
      documents: texts, which the embedding is fitted to.
      queries: texts.
      size: of the embedding.

    Returns:
      Float [q, n].
    """
    vectorizer = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), sublinear_tf=True)
    counted = vectorizer.fit_transform(documents)
    reduction = TruncatedSVD(min(size, min(counted.shape) - 1), random_state=0)
    train = normalize(reduction.fit_transform(counted))
    return normalize(reduction.transform(vectorizer.transform(queries))) @ train.T
