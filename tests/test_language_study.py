"""The parts of the language study that a run does not check by itself."""

import numpy as np
import pytest

from experiments.language import baselines, corpus, facts, figures, text


def test_each_fact_has_one_source_and_a_distractor_without_the_answer():
    made = facts.invent(9)
    assert len(made.documents) == 18 and len(set(made.documents)) == 18
    for number, (prompt, answer) in enumerate(zip(made.prompts, made.answers, strict=True)):
        holding = [i for i, document in enumerate(made.documents) if answer.strip() in document]
        assert holding == [number]
        assert prompt + answer in made.documents[number]
        subject = max(prompt.split(), key=lambda word: (word[0].isupper(), len(word)))
        assert subject in made.documents[9 + number]


def test_questions_ask_for_the_answer_alone_and_sources_are_where_they_should_be():
    texts = [f"document number {i} says {i * i} and little else" for i in range(30)]
    made = corpus.assemble(texts, text.Bytes(), context=128, train=16, queries=5, known=4)
    assert made.sources.sum(axis=1).tolist() == [1, 1, 1, 1]
    for row, (sentence, answer) in enumerate(
        zip(made.sentences, facts.invent(4).answers, strict=True)
    ):
        asked = made.questions["targets"][row][made.questions["mask"][row]]
        assert bytes(asked.tolist()).decode() == answer and sentence.endswith(answer)
        assert sentence in made.texts[np.flatnonzero(made.sources[row])[0]]
    shown = [bytes(ids[m].tolist()) for part in (made.learning, made.evaluation, made.train)
             for ids, m in zip(part["targets"], part["mask"], strict=True)]  # fmt: skip
    assert len(set(shown)) == 5 + 5 + 16  # no query is trained on
    with pytest.raises(ValueError, match="need at least 19 documents; got 18"):
        corpus.assemble(texts[:18], text.Bytes(), context=128, train=16, queries=5, known=4)


def test_baselines_find_words_that_only_one_document_has():
    documents = ["the cat sat", "the dog ran home", "a fish swam in the sea"]
    for scores in (baselines.bm25, baselines.embeddings):
        found = scores(documents, ["fish in the sea", "dog ran"])
        assert found.shape == (2, 3) and found.argmax(axis=1).tolist() == [2, 1]


def test_weights_are_drawn_where_they_belong():
    weights = {"blocks/up[0]": 1.0, "blocks/up[1]": 2.0, "blocks/attention/key[1]": 3.0}
    grid = figures.table(weights | {"norm": 4.0})
    rows = list(figures.ROWS)
    assert grid[rows.index("up")].tolist() == [1.0, 2.0] and grid[rows.index("key"), 1] == 3.0
    assert grid[-1, 0] == 4.0 and np.isnan(grid).sum() == grid.size - 4
