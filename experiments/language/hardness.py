"""How many of the facts a search for words finds, by kind.

python -m experiments.language.hardness     # some 40 s
"""

import numpy as np
from rich.table import Table

from experiments import command_line
from experiments.language import baselines, corpus, facts, study, text
from experiments.language.corpus import Corpus
from jaxattr import evaluation

KNOWN = 64


def main() -> None:
    """Prints the table."""
    config = study.QUICK
    context = config.model.context
    documents = text.deduplicated(text.documentation(), 80, context - 1)
    command_line.console().print(
        table(
            corpus.assemble(
                documents, text.Bytes(), context=context, train=config.train,
                queries=config.queries, known=KNOWN, kinds=tuple(facts.KINDS),
            )
        )
    )  # fmt: skip


def table(found: Corpus) -> Table:
    """Makes the table.

    Args:
      found: the corpus.

    Returns:
      A table for a terminal.
    """
    title = f"Among {len(found.texts)} documents: is a source first, in %; share of the sources "
    title += "among the first five, in %; mean reciprocal rank of the best source"
    shown = Table("scores", "kind", "recall@1", "recall@5", "MRR", title=title)
    scores = {
        "BM25": baselines.bm25(found.texts, found.sentences),
        "BM25 without the answer": baselines.bm25(found.texts, found.prompts),
        "text embedding": baselines.embeddings(found.texts, found.sentences),
        "text embedding without the answer": baselines.embeddings(found.texts, found.prompts),
    }
    for name, values in scores.items():
        for kind in facts.KINDS:
            rows = np.array(found.kinds) == kind
            each = values[rows], found.sources[rows]
            shown.add_row(
                name,
                kind,
                f"{100 * evaluation.hit_at_k(*each, 1).mean():.0f}",
                f"{100 * evaluation.recall_at_k(*each, 5).mean():.0f}",
                f"{evaluation.mean_reciprocal_rank(*each):.2f}",
            )
    return shown


if __name__ == "__main__":
    main()
