"""The parts of the language study that a run does not check by itself."""

import re
import types

import numpy as np
import pytest

import jaxattr as ja
from experiments.language import baselines, corpus, facts, figures, text
from jaxattr import evaluation


def test_each_fact_has_one_source_and_a_distractor_without_the_answer():
    made = facts.invent(9)
    assert len(made.documents) == 18 and len(set(made.documents)) == 18
    for number, (prompt, answer) in enumerate(zip(made.prompts, made.answers, strict=True)):
        holding = [i for i, document in enumerate(made.documents) if answer.strip() in document]
        assert holding == [number]
        assert prompt + answer in made.documents[number]
        subject = max(prompt.split(), key=lambda word: (word[0].isupper(), len(word)))
        assert subject in made.documents[9 + number]


STOP = set("the a of in to by at is was are and with for up that who those".split())


def words(sentence):
    return set(re.findall(r"\w+", sentence)) - STOP


def test_stated_facts_stay_what_the_figures_are_of():
    assert facts.invent(32).documents[:2] == [
        "Ferkastan is a country by the sea. The capital of Ferkastan is Zortanvia, where the "
        "parliament meets.",
        "The river Miferbury rises in the hills near Beldriloth. Boats on Miferbury sail from "
        "Beldriloth to the coast.",
    ]


def test_hard_facts_are_what_they_say():
    made = facts.invent(64, kinds=tuple(facts.KINDS))
    assert len(set(made.documents)) == len(made.documents)
    assert max(map(len, made.documents)) < 127  # whole in the study's rows
    given = zip(made.kinds, made.prompts, made.answers, made.sources, strict=True)
    for kind, prompt, answer, places in given:
        sources = [made.documents[place] for place in places]
        assert answer.strip() in words(sources[-1])
        subject = next(word for word in prompt.split() if word[0].isupper() and len(word) > 6)
        if kind == "reworded":
            assert not words(prompt) & words(sources[0])
            (alias,) = (text for text in made.documents if subject in words(text))
            assert len(words(alias) & words(sources[0])) >= 1
        elif kind == "joined":
            first, second = map(words, sources)
            assert subject in first and subject not in second and answer.strip() not in first
            assert any(word[0].isupper() for word in first & second)
        elif kind == "crowded":
            named = [text for text in made.documents if subject in words(text)]
            shared = [len(words(prompt) & words(text)) for text in named if text not in sources]
            assert len(shared) == 2 and min(shared) > len(words(prompt) & words(sources[0]))


@pytest.mark.parametrize("kind", facts.KINDS)
def test_a_search_for_words_finds_what_is_stated_and_not_what_is_hard(kind):
    made = facts.invent(64, kinds=tuple(facts.KINDS))
    asked = [f"{p}{a}" for p, a in zip(made.prompts, made.answers, strict=True)]
    scores = baselines.bm25(made.documents, asked)
    relevant = np.zeros(scores.shape, bool)
    for row, places in enumerate(made.sources):
        relevant[row, places] = True
    rows = np.array(made.kinds) == kind
    found = evaluation.hit_at_k(scores[rows], relevant[rows], 1).mean()
    assert found > 0.95 if kind == "stated" else found < 0.5


def test_hard_facts_are_in_the_corpus_with_all_their_sources():
    texts = [f"document number {i} says {i * i} and little else" for i in range(60)]
    kinds = tuple(facts.KINDS)
    made = corpus.assemble(
        texts, text.Bytes(), context=128, train=40, queries=5, known=8, kinds=kinds
    )
    assert made.kinds == [*kinds, *kinds] and made.sources.sum(axis=1).tolist() == [1, 1, 2, 1] * 2
    invented = facts.invent(8, kinds=kinds)
    for row, places in zip(made.sources, invented.sources, strict=True):
        found = [made.texts[place] for place in np.flatnonzero(row)]
        assert found == [invented.documents[place] for place in places]


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


def test_kinds_of_facts_have_a_column_each_if_there_are_several():
    from experiments.language import __main__ as study_main
    from experiments.language.study import Retrieval

    hits = np.array([True, False, True, True])
    found = Retrieval(hits, 0.8, np.zeros((4, 3), int))
    run = study_main.Run({}, {"BM25": found}, {"BM25": np.zeros((4, 3))}, {})
    kinds = ["stated", "joined"] * 2
    table = study_main.facts_table([run, run], kinds)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["stated"] == ["100"] and cells["joined"] == ["50"]
    made = study_main.as_json(run, kinds)["baselines"]["BM25"]
    assert made["recall_at_1_by_kind"] == {"stated": 1.0, "joined": 0.5}
    plain = study_main.facts_table([run], ["stated"] * 4)
    assert [column.header for column in plain.columns] == [
        "method", "weights", "recall@1", "MRR", "tail-patch"
    ]  # fmt: skip


def test_every_number_of_the_table_has_a_heading():
    from experiments.language import __main__ as study_main

    interval = types.SimpleNamespace(mean=0.2, low=0.1, high=0.3)
    lds = dict.fromkeys(("uniform", "learned", "fitted to truth"), interval)
    result = types.SimpleNamespace(lds=lds, difference=interval)
    patches = {key: np.ones((3, 2)) for key in (("A", "uniform"), ("A", "learned"), "chance")}
    table = study_main.lds_table([study_main.Run({"A": result}, {}, {}, patches)])
    assert [column.header.replace("\n", " ") for column in table.columns] == [
        "method", *lds, "learned - uniform", "tail-patch uniform", "tail-patch learned"
    ]  # fmt: skip
    assert all(next(iter(column.cells)) for column in table.columns)


def test_activations_of_the_model_are_compared():
    import jax
    import jax.numpy as jnp

    from experiments.language import gpt2, study

    texts = [f"document number {i} says {i * i} and little else" for i in range(60)]
    made = corpus.assemble(texts, text.Bytes(), context=64, train=16, queries=5, known=4)
    model = gpt2.Config(
        vocabulary=256, context=64, width=8, depth=1, heads=2, remat=False, dtype=jnp.float64
    )
    params = gpt2.initial(model, jax.random.key(0))
    subject = study.Subject(
        gpt2.logits_fn(model),
        None,
        made,
        params,
        params,
        None,
        None,
        None,  # not trained
    )
    index = study.activations(subject, study.Config(model))
    hidden, logits_of = jax.jit(gpt2.hidden_fn(model)), jax.jit(gpt2.logits_fn(model))

    def mean(rows, i):
        row = {name: jnp.asarray(array[i]) for name, array in rows.items()}
        logits = logits_of(params, row)
        np.testing.assert_allclose(
            hidden(params, row) @ params["embed"]["embedding"].T, logits, rtol=1e-5
        )
        found = np.asarray(hidden(params, row))[row["mask"].astype(bool)].mean(axis=0)
        return found / np.linalg.norm(found)

    expected = np.array([[mean(made.questions, q) @ mean(made.train, n) for n in range(16)]
                         for q in range(4)])  # fmt: skip
    np.testing.assert_allclose(ja.score(index, made.questions), expected, atol=1e-5)
