import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattr import evaluation
from jaxattr.scores.ranking import TopK

TRAIN = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]]), "y": jnp.array([1.0, 2.0, 0.5])}
QUERIES = jax.tree.map(lambda x: x[:2] * 0.5, TRAIN)
PARAMS = {"w": jnp.array([0.3, -0.2])}


def loss(params, example, key):
    return 0.5 * (params["w"] @ example["x"] - example["y"]) ** 2


def measure(params, example, key):
    return jnp.exp(-loss(params, example, key))


gradient_of = jax.jit(jax.grad(loss))


def by_hand(optimizer, state, ids):
    changes = np.zeros(ids.shape)
    for q, row in enumerate(ids):
        for k, n in enumerate(row):
            query, example = (jax.tree.map(lambda x, i=i: x[i], d) for d, i in
                              ((QUERIES, q), (TRAIN, n)))  # fmt: skip
            gradient = gradient_of(PARAMS, example, None)
            patched = optax.apply_updates(PARAMS, optimizer.update(gradient, state, PARAMS)[0])
            changes[q, k] = measure(patched, query, None) - measure(PARAMS, query, None)
    return changes


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.01)])
def test_each_step_starts_from_the_same_parameters_and_state(optimizer):
    ids = np.array([[0, 1, 2], [2, 2, 0]])
    state = optimizer.init(PARAMS)
    _, warm = optimizer.update(PARAMS, state, PARAMS)
    for given, used in ((None, state), (warm, warm)):
        changes = evaluation.tail_patch(
            loss, measure, PARAMS, TRAIN, QUERIES, ids,
            optimizer=optimizer, optimizer_state=given, at_once=2,
        )  # fmt: skip
        assert np.allclose(changes, by_hand(optimizer, used, ids), rtol=1e-10, atol=0)
    assert changes[1, 0] == changes[1, 1]
    top = TopK(jnp.asarray(ids), jnp.zeros(ids.shape))
    given = (loss, measure, PARAMS, TRAIN, QUERIES)
    same = evaluation.tail_patch(*given, top, optimizer=optimizer, optimizer_state=state)
    np.testing.assert_array_equal(
        same, evaluation.tail_patch(*given, ids, optimizer=optimizer, optimizer_state=state)
    )


def test_missing_proponents_are_not_counted():
    changes = evaluation.tail_patch(
        loss, measure, PARAMS, TRAIN, QUERIES, [[0, -1], [1, 2]], optimizer=optax.sgd(0.1)
    )
    assert np.isnan(changes).tolist() == [[False, True], [False, False]]


def test_a_proponent_whose_loss_is_not_finite_has_no_change():
    def of_label(params, example, key):
        return optax.softmax_cross_entropy_with_integer_labels(params["w"], example)

    def tail_patch(labels):
        return evaluation.tail_patch(
            of_label, of_label, PARAMS, labels, jnp.array([0]), [[0, 1]], optimizer=optax.sgd(0.1)
        )

    # Its gradient is finite: as if no label were the right one.
    changes = tail_patch(jnp.array([1, 99]))
    assert np.isnan(changes).tolist() == [[False, True]]
    assert changes[0, 0] == tail_patch(jnp.array([1, 1]))[0, 0]


def test_what_training_does_not_move_stays_as_it_is():
    params = {"params": PARAMS, "batch_stats": {"mean": jnp.array(0.1)}, "count": jnp.int32(3)}

    def shifted(params, example, key):
        example = example | {"y": example["y"] - params["batch_stats"]["mean"]}
        return loss(params["params"], example, key)

    def of_parameters(alone, example, key):
        return shifted(params | {"params": alone}, example, key)

    rest = (TRAIN, QUERIES, [[0, 1], [2, 0]])
    with pytest.raises(ValueError, match=r"params holds batch statistics.*exclude='batch_stats'"):
        evaluation.tail_patch(shifted, shifted, params, *rest, optimizer=optax.adam(0.1))
    found = evaluation.tail_patch(
        shifted, shifted, params, *rest, optimizer=optax.adam(0.1), exclude="^batch_stats"
    )
    expected = evaluation.tail_patch(
        of_parameters, of_parameters, PARAMS, *rest, optimizer=optax.adam(0.1)
    )
    assert np.allclose(found, expected, rtol=1e-10, atol=0) and found.any()


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([[0], [3]], "those of the 3 training examples"),
        ([[0]], r"must be integers \[2, k\]"),
        ([[0.5], [1.0]], "must be integers"),
    ],
)
def test_bad_ids_are_refused(ids, match):
    with pytest.raises(ValueError, match=match):
        evaluation.tail_patch(loss, measure, PARAMS, TRAIN, QUERIES, ids, optimizer=optax.sgd(0.1))
