import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from experiments.language import gpt2
from jaxattr import language
from tests.models import relative_error

CONFIG = gpt2.Config(vocabulary=13, context=8, width=8, depth=2, heads=2, dtype=jnp.float64)
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12, 1, 2, 12, 4, 6]]
LOGITS = jax.jit(gpt2.logits_fn(CONFIG))
LOSS = language.loss(LOGITS)


def tiny_logits(params, row):
    """A model that compiles in no time: each position reads the sum of what came before."""
    read = jnp.cumsum(params["embed"][row["inputs"]], axis=0)
    return jnp.tanh(read @ params["mix"] + params["bias"][None]) @ params["embed"].T


@pytest.fixture(scope="module")
def tiny_params():
    shapes = {"embed": (13, 6), "mix": (6, 6), "bias": (6,)}
    numbers = np.random.default_rng(0)
    return {name: jnp.asarray(numbers.normal(size=shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def params():
    drawn = gpt2.initial(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(jnp.float64) * 5 + 0.1, drawn)


def rows(length=8, **options):
    return language.rows(DOCUMENTS, length, vocabulary=13, **options)


def row(made, number):
    return jax.tree.map(lambda x: jnp.asarray(x[number]), made)


@jax.jit
def loss_of(params, row):
    return LOSS(params, row, jax.random.key(0))


def test_loss_is_the_sum_over_targets_whatever_the_padding(params):
    for number, document in enumerate(DOCUMENTS):
        ids = jnp.array(document)
        logits = LOGITS(params, {"inputs": ids[:-1]})
        expected = -jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), ids[1:]].sum()
        for length in (5, 8):
            assert relative_error(loss_of(params, row(rows(length), number)), expected) < 1e-12


def test_a_prompt_is_not_asked_for(params):
    whole, answer = row(rows(), 0), row(rows(prompts=[3, 1, 1, 1]), 0)
    ids = jnp.array(DOCUMENTS[0])
    losses = -jax.nn.log_softmax(LOGITS(params, {"inputs": ids[:-1]}))[jnp.arange(4), ids[1:]]
    assert relative_error(loss_of(params, whole), losses.sum()) < 1e-12
    assert relative_error(loss_of(params, answer), losses[2:].sum()) < 1e-12


def test_packed_neighbours_change_neither_loss_nor_features(params):
    featurize = ja.featurizer(
        ja.tracin(LOSS, projection=ja.projections.two_sided(4)), params, row(rows(), 0)
    )
    made = language.packed(DOCUMENTS, 8, vocabulary=13)
    alone = language.rows(DOCUMENTS[:2], 8, vocabulary=13)
    first = row(made, 0) | {"mask": jnp.asarray(made["segments"][0] <= 2)}
    assert made["segments"][0].tolist() == [1, 1, 1, 1, 2, 3, 3, 3]
    assert (
        relative_error(loss_of(params, first), sum(loss_of(params, row(alone, i)) for i in (0, 1)))
        < 1e-12
    )
    in_row = featurize(params, jax.tree.map(lambda x: x[None], first))[0]
    assert relative_error(in_row, featurize(params, alone).sum(axis=0)) < 1e-10


def test_packing_loses_no_target():
    made = language.packed(DOCUMENTS, 3, vocabulary=13)
    pairs = zip(made["inputs"][made["mask"]], made["targets"][made["mask"]], strict=True)
    expected = [pair for d in DOCUMENTS for pair in zip(d[:-1], d[1:], strict=True)]
    assert [(int(a), int(b)) for a, b in pairs] == expected


@pytest.mark.parametrize("name", ["grad_cos", "trak", "trackstar", "ekfac"])
def test_scores_of_tokens_add_up_to_the_score_of_the_query(tiny_params, name):
    loss = language.loss(tiny_logits)
    two_sided = ja.projections.two_sided(3)
    moments = jax.tree.map(lambda x: jnp.abs(x) + 0.1, tiny_params)
    method = {
        "grad_cos": lambda: ja.grad_cos(loss, projection=two_sided),
        "trak": lambda: ja.trak(
            language.margin(tiny_logits),
            residual=language.residual(tiny_logits),
            projection=two_sided,
        ),
        "trackstar": lambda: ja.trackstar(loss, moments, tiny_params, rank=3),
        "ekfac": lambda: ja.ekfac(loss, fisher="true", rank=8),
    }[name]()
    index = ja.build_index(method, tiny_params, rows(), batch_size=2)
    queries = language.rows([[1, 5, 3, 2], [4, 12, 1, 9]], 5, vocabulary=13, prompts=[1, 2])
    weights = dict(zip(index.layout.names, np.linspace(0, 2, len(index.layout.names)), strict=True))
    tokens = language.token_features(index, queries)
    by_token = ja.score(index, tokens, weights=weights).reshape(2, 5, -1)
    assert relative_error(by_token.sum(axis=1), ja.score(index, queries, weights=weights)) < 1e-9
    assert not by_token[1, 0].any() and not by_token[:, 3:].any()  # prompt and padding
    parts = ja.contributions(index, tokens).reshape(2, 5, index.size, -1).sum(axis=1)
    assert relative_error(parts, ja.contributions(index, queries)) < 1e-9


def test_margin_and_probability_against_the_closed_form(params):
    example, ids = row(rows(), 0), jnp.array(DOCUMENTS[0])
    p = jax.nn.softmax(LOGITS(params, {"inputs": ids[:-1]}))[jnp.arange(4), ids[1:]]
    key = jax.random.key(0)
    margin = jnp.log(p / (1 - p)).sum()
    found = jax.jit(language.margin(LOGITS))(params, example, key)
    assert relative_error(found, margin) < 1e-10
    found = jax.jit(language.residual(LOGITS))(params, example, key)
    assert relative_error(found, 1 - p.mean()) < 1e-12


@pytest.mark.parametrize("logit", [4.0, 14.0, 20.0, 1e4])
def test_margins_of_certain_targets_keep_their_gradients(logit):
    """By the log of p they came out as 16 and 0 from a logit of 16 on."""
    z = jnp.array([[logit, 0.3, -0.2, 0.1]], jnp.float32)
    example = {"targets": jnp.array([0]), "mask": jnp.array([True])}
    outputs = [make(lambda params, row: params) for make in (language.margin, language.residual)]
    found = [jax.value_and_grad(f)(z, example, jax.random.key(0)) for f in outputs]
    others = np.exp(np.array([0.3, -0.2, 0.1]))
    odds = logit - np.log(others.sum())
    np.testing.assert_allclose(found[0][0], odds, rtol=1e-6)
    np.testing.assert_allclose(found[0][1], [[1, *-others / others.sum()]], rtol=1e-6)
    rest = 1 / (1 + np.exp(np.minimum(odds, 700)))
    np.testing.assert_allclose(found[1][0], rest, rtol=1e-5, atol=1e-40)


def test_a_token_that_alone_is_allowed_has_no_gradient():
    def logits(z, row):
        return jnp.where(jnp.array([[True, True, True], [True, False, False]]), z, -jnp.inf)

    z = jnp.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    for mask in ([True, False], [True, True]):
        example = {"targets": jnp.array([0, 0]), "mask": jnp.array(mask)}
        for make in (language.margin, language.residual):
            value, slope = jax.value_and_grad(make(logits))(z, example, jax.random.key(0))
            assert jnp.isfinite(value) and jnp.isfinite(slope).all()
            assert slope[0].any() and not slope[1].any()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_row_whose_mask_is_below_zero_is_left_out(dtype, tiny_params):
    rows = language.rows([[1, 2, 3], [2, 3, 4, 1], [0, 1]], 4, vocabulary=5)
    rows["mask"] = rows["mask"].astype(dtype)
    rows["mask"][1, 3] = -100
    table = {"e": jax.random.normal(jax.random.key(0), (5, 5), jnp.float32)}
    loss = language.loss(lambda params, row: params["e"][row["inputs"]])
    with pytest.warns(ja.NonFiniteWarning, match="ids 1"):
        index = ja.build_index(ja.tracin(loss), table, rows)
    assert index.non_finite.tolist() == [1]


def test_probability_is_the_mean_by_the_weights_of_a_mask():
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.6, 0.4]]))
    for weights in ([0.1, 0], [0.1, 0.2], [3, 5]):
        example = {"targets": jnp.array([1, 0]), "mask": jnp.array(weights, jnp.float32)}
        mean = np.average([0.75, 0.6], weights=weights)
        for make, expected in ((language.probability, mean), (language.residual, 1 - mean)):
            output = make(lambda params, row: logits)
            assert relative_error(output({}, example, jax.random.key(0)), expected) < 1e-6


def test_targets_of_a_model_in_bfloat16_are_drawn_from_its_distribution():
    """By noise of 128 values 0.993 of them were the first token's, and ties the lowest id's."""
    logits = jnp.concatenate([jnp.zeros(1), jnp.full(999, np.log(0.1 / 0.9 / 999))])
    logits = jnp.broadcast_to(logits.astype(jnp.bfloat16), (20_000, 1000))
    count = {"targets": jnp.zeros(20_000, int), "mask": jnp.ones(20_000, bool)}
    drawn = language.loss(lambda params, row: logits).sample({}, count, jax.random.key(0))
    assert abs(float((drawn["targets"] == 0).mean()) - 0.9) < 0.01


OUTPUTS = [language.loss, language.margin, language.residual, language.probability]


@pytest.mark.parametrize("make", OUTPUTS)
@pytest.mark.parametrize("wrong", [-100, -1, 13])
def test_a_target_that_is_no_token_is_not_finite_where_it_counts(make, wrong, tiny_params):
    output = make(tiny_logits)
    example = row(rows(), 0)
    found = jax.jit(jax.value_and_grad(output))
    expected = found(tiny_params, example, jax.random.key(0))
    padded = jnp.where(example["mask"], example["targets"], wrong)
    given = found(tiny_params, example | {"targets": padded}, jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), given, expected)
    asked = example | {"targets": example["targets"].at[1].set(wrong)}
    assert jnp.isnan(output(tiny_params, asked, jax.random.key(0)))


def test_sampled_targets_replace_those_that_count(params):
    example = row(rows(prompts=[3, 1, 1, 1]), 0)
    drawn = LOSS.sample(params, example, jax.random.key(1))
    assert (drawn["targets"] == example["targets"])[~example["mask"]].all()
    assert drawn["targets"].dtype == example["targets"].dtype


@pytest.mark.parametrize(
    ("documents", "options", "match"),
    [
        ([[1, 2], []], {}, "Document 1 is empty"),
        ([[1, 2], [3, 13]], {}, "Document 1 holds token 13, and the model knows 0 to 12"),
        ([[1, 2, 3, 4]], {}, "Document 0 has 4 tokens, and a row of 2 positions takes 3"),
        ([[1]], {}, "Document 0 has no target"),
        ([[1, 2, 3]], {"prompts": [3]}, "first 3 are the prompt"),
        ([[1, 2, 3]], {"prompts": []}, "prompts must be one per document"),
        ([[1, 2, 3, 4]], {"prompts": [3], "truncate": True}, "Document 0 has no target"),
    ],
)
def test_bad_documents_are_refused(documents, options, match):
    with pytest.raises(ValueError, match=match):
        language.rows(documents, 2, vocabulary=13, **options)
    with pytest.raises(ValueError, match="length must be at least 1, got -1"):
        language.rows([[1, 2]], -1, vocabulary=13)


@pytest.mark.parametrize("make", [language.probability, language.residual])
def test_tokens_of_a_mean_are_refused(tiny_params, make):
    index = ja.build_index(ja.tracin(make(tiny_logits)), tiny_params, rows())
    queries = language.rows([[1, 5, 3, 2], [4, 12]], 5, vocabulary=13)
    with pytest.raises(ValueError, match="a mean over targets is no sum"):
        language.token_features(index, queries)
    one_target = jax.tree.map(lambda x: x[1:], queries)
    tokens = ja.score(index, language.token_features(index, one_target))
    assert relative_error(tokens.sum(axis=0), ja.score(index, one_target)[0]) < 1e-9


def test_tokens_of_a_list_of_rows_and_of_one_that_is_not_finite(tiny_params):
    def of_row(params, row, key):
        value = language.loss(tiny_logits)(params, row, key)
        return value * jnp.where(row["inputs"][0] == 4, jnp.nan, 1.0)

    index = ja.build_index(ja.tracin(of_row), tiny_params, rows())
    queries = language.rows([[1, 5, 3], [4, 12]], 3, vocabulary=13)
    listed = [jax.tree.map(lambda x, i=i: x[i], queries) for i in range(2)]
    with pytest.warns(ja.NonFiniteWarning, match="1 of 2 queries .* ids 1"):
        found = language.token_features(index, listed)
    assert found.non_finite.tolist() == [3, 4, 5]
    expected = language.token_features(index, jax.tree.map(lambda x: x[:1], queries))
    assert relative_error(found.features[:3], expected.features) < 1e-12


def test_a_query_without_targets_is_refused(tiny_params):
    index = ja.build_index(ja.tracin(language.loss(tiny_logits)), tiny_params, rows())
    queries = rows()
    queries["mask"][2] = False
    with pytest.raises(ValueError, match=r"1 queries have no target tokens, at positions \[2\]"):
        language.token_features(index, queries)
    with pytest.raises(ValueError, match="Document 0 has 1 tokens"):
        language.packed([[1]], 4, vocabulary=13)
