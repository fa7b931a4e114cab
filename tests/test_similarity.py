"""Baselines in the same tables: embeddings as a method, and scores made elsewhere as an index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import evaluation
from jaxattr.methods import similarity
from tests import models

TRAIN, QUERIES = models.data(30), models.data(4, seed=1)
PARAMS = models.mlp_params()
ONLY_PROBE = ja.by_leaf(exclude="^model")


def hidden(params, example):
    """Activations of two layers."""
    first = jnp.tanh(example["x"] @ params["layer0"]["kernel"])
    return {"first": first, "second": jnp.tanh(first @ params["layer1"]["kernel"])}


def second(params, example):
    return hidden(params, example)["second"]


def of_all(embed, batch):
    return np.stack([embed(PARAMS, {"x": x}) for x in batch["x"]])


def index_of(embed, probe, **given):
    params = {"probe": probe, "model": PARAMS}
    return ja.build_index(ja.embedding(embed, **given), params, TRAIN, groups=ONLY_PROBE)


@pytest.mark.parametrize("cosine", [True, False])
def test_scores_are_similarities_of_embeddings(cosine):
    index = index_of(second, jnp.zeros(5), cosine=cosine)
    e, asked = of_all(second, TRAIN), of_all(second, QUERIES)
    if cosine:
        e, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (e, asked))
    np.testing.assert_allclose(ja.score(index, QUERIES), asked @ e.T, atol=1e-12)
    top = ja.top_k(index, QUERIES, k=3)
    np.testing.assert_array_equal(top.ids, evaluation.strongest(asked @ e.T, 3))
    assert index.layout.names == ("probe",) and index.layout.total == 5


def test_layers_are_groups_with_weights_of_their_own():
    index = index_of(hidden, {"first": jnp.zeros(7), "second": jnp.zeros(5)}, cosine=False)
    assert index.layout.names == ("probe/first", "probe/second")
    by_hand = [
        of_all(lambda p, x, n=n: hidden(p, x)[n], QUERIES)
        @ of_all(lambda p, x, n=n: hidden(p, x)[n], TRAIN).T
        for n in ("first", "second")
    ]
    np.testing.assert_allclose(
        ja.contributions(index, QUERIES), np.stack(by_hand, axis=-1), atol=1e-12
    )
    weighted = ja.score(index, QUERIES, weights={"probe/first": 0.0, "probe/second": 2.0})
    np.testing.assert_allclose(weighted, 2 * by_hand[1], atol=1e-12)


def test_queries_of_another_embedding_are_compared_too():
    index = index_of(second, jnp.zeros(5), cosine=False)
    other = similarity.Probed(lambda params, example: 2 * second(params, example))
    found = ja.score(index, ja.query_features(index, QUERIES, output=other))
    np.testing.assert_allclose(found, 2 * of_all(second, QUERIES) @ of_all(second, TRAIN).T)


def test_an_index_of_embeddings_is_opened_again_and_knows_its_embedding(tmp_path):
    method, params = ja.embedding(second), {"probe": jnp.zeros(5), "model": PARAMS}
    made = ja.build_index(method, params, TRAIN, groups=ONLY_PROBE, path=tmp_path / "index")
    opened = ja.open_index(tmp_path / "index", method, params)
    np.testing.assert_array_equal(ja.score(opened, QUERIES), ja.score(made, QUERIES))
    other = ja.embedding(lambda params, example: 2 * second(params, example))
    with pytest.raises((ValueError, ja.StoreError)):
        ja.open_index(tmp_path / "index", other, params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (PARAMS, "parameters of an embedding are .*; got .'layer0', 'layer1', 'layer2'."),
        ({"probe": jnp.zeros(4), "model": PARAMS}, "probe must have the shapes of the embedding"),
        ({"probe": [jnp.zeros(5)], "model": PARAMS}, "probe must have the shapes"),
    ],
)
def test_parameters_without_a_fitting_probe_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        ja.build_index(ja.embedding(second), params, TRAIN)


def test_an_embedding_is_a_function_of_parameters_and_an_example():
    with pytest.raises(TypeError, match=r"embed takes .x., and is called as .params, example."):
        ja.embedding(lambda x: x)
    with pytest.raises(TypeError, match="embed must be a function"):
        ja.embedding(np.ones((3, 4)))


def test_given_scores_are_those_of_the_index():
    numbers = np.random.default_rng(0)
    scores = numbers.normal(size=(4, 30))
    scores[0, [3, 7]] = 9.0  # a tie goes to the lower id
    index, asked = evaluation.index_of_scores(scores, TRAIN, QUERIES, name="BM25")
    np.testing.assert_array_equal(ja.score(index, asked), scores)
    top = ja.top_k(index, asked, k=5)
    np.testing.assert_array_equal(top.ids, evaluation.strongest(scores, 5))
    np.testing.assert_array_equal(top.scores, -np.sort(-scores, axis=1)[:, :5])
    least = ja.top_k(index, asked, k=5, opponents=True)
    np.testing.assert_array_equal(least.ids, evaluation.strongest(-scores, 5))
    assert index.method.name == "BM25" and top.ids[0, :2].tolist() == [3, 7]
    # Two stages: what BM25 finds, ranked by gradients.
    exact = ja.build_index(ja.tracin(models.loss), PARAMS, TRAIN)
    both = ja.top_k(exact, QUERIES, k=2, among=top)
    found = np.where(np.isin(np.arange(30), top.ids[1]), ja.score(exact, QUERIES)[1], -np.inf)
    assert both.ids[1].tolist() == evaluation.strongest(found[None], 2)[0].tolist()


def test_whole_numbers_and_small_floats_are_scores():
    scores = np.array([[3, 1, 2], [0, 5, 4]], np.int8)
    for each in (scores, scores.astype(np.float16), jnp.asarray(scores, jnp.bfloat16)):
        data = {"x": np.arange(3.0)}, {"x": np.arange(2.0)}
        index, asked = evaluation.index_of_scores(each, *data)
        np.testing.assert_array_equal(ja.score(index, asked), scores)


@pytest.mark.parametrize(
    ("scores", "train", "message"),
    [
        (np.ones((30, 4)), TRAIN, r"\[q, n\] = \[4, 30\], got float64 \[30, 4\]"),
        (np.ones((4, 30), complex), TRAIN, "real numbers"),
        (np.where(np.eye(4, 30) > 0, np.nan, 1), TRAIN, "4 scores are not finite in float64, the"),
        (
            np.full((4, 30), 1e200, np.longdouble) ** 2,
            TRAIN,
            "120 scores are not finite in float64",
        ),
        (np.ones((4, 30)), TRAIN["x"], "train must be a dict of arrays"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, train, message):
    with pytest.raises(ValueError, match=message):
        evaluation.index_of_scores(scores, train, QUERIES)


def test_a_report_of_a_baseline_says_that_it_compares(tmp_path):
    texts = ["the cat sat", "a dog ran", "fish swim"]
    scores = np.array([[0.0, 1.5, 0.2], [2.0, 0.0, -1.0]])
    data = {"number": np.arange(3)}, {"number": np.arange(2)}
    index, asked = evaluation.index_of_scores(scores, *data, name="BM25")
    given = dict(render=lambda example: texts[example["number"]], path=tmp_path / "page.html")
    page = ja.report(index, asked, **given).read_text()
    assert "BM25" in page and "a dog ran" in page and "This is a baseline" in page
    assert "made the model do more" not in page
    exact = ja.report(ja.build_index(ja.tracin(models.loss), PARAMS, TRAIN), QUERIES,
                      path=tmp_path / "exact.html").read_text()  # fmt: skip
    assert "made the model do more" in exact and "This is a baseline" not in exact


def test_tokens_are_coloured_where_they_add_up(tmp_path):
    rows = {
        "inputs": np.arange(12).reshape(3, 4),
        "targets": np.arange(1, 13).reshape(3, 4),
        "mask": np.ones((3, 4), bool),
    }
    asked = jax.tree.map(lambda x: x[:1], rows)
    given = evaluation.index_of_scores(np.array([[1.0, 2.0, -1.0]]), rows, asked)
    embed = lambda params, row: jnp.where(row["mask"], row["targets"], 0.0)  # noqa: E731
    summed = ja.build_index(ja.embedding(embed), {"probe": jnp.zeros(4), "model": {}}, rows)
    for (index, queries), coloured in ((given, False), ((summed, asked), True)):
        page = ja.report(index, queries, path=tmp_path / "page.html").read_text()
        assert ("Blue tokens raise the score" in page) == coloured
