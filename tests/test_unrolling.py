"""Unrolled influence is the derivative of retraining, by each example's weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxattr as ja
from jaxattr.unrolling import backward
from jaxattr.weights.outcomes import outcomes_of_scores
from tests import models

N, STEPS, BATCH = 7, 9, 3
DATA = models.data(12)
TRAIN = jax.tree.map(lambda x: x[:N], DATA)
QUERIES = jax.tree.map(lambda x: x[N:], DATA)
IDS = np.random.default_rng(0).integers(N - 1, size=(STEPS, BATCH))  # the last is never used
START = models.mlp_params(sizes=(6, 4, 3))
SGD = optax.sgd(0.3)
KEY = jax.random.key(4)


def step_of(optimizer, losses=None):
    """A training step of (params, optimizer state); losses: (params, batch) -> [b]."""
    if losses is None:
        losses = lambda params, batch: jax.vmap(models.loss, (None, 0, None))(  # noqa: E731
            params, batch, jax.random.key(0)
        )

    def step(state, batch, weights):
        params, moments = state
        gradient = jax.grad(lambda params: (weights * losses(params, batch)).mean())(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    return step


def run_of(optimizer, losses=None, start=START, batches=IDS, **options):
    state = start, optimizer.init(start)
    step = step_of(optimizer, losses)
    return ja.TrainingRun(step, state, batches, TRAIN, params=lambda state: state[0], **options)


def minus_loss(params, example, key):
    return -models.loss(params, example, key)


def differences(run, output=minus_loss, h=1e-5):
    """Central differences of retraining with one example's weight moved, [q, n]."""
    weights = np.concatenate([1 + h * np.eye(N), 1 - h * np.eye(N)])
    params = jax.vmap(run.params)(run.trained(weights))
    found = jax.vmap(jax.vmap(output, (0, None, None)), (None, 0, None))(
        params, QUERIES, jax.random.key(0)
    )
    return np.asarray(found[:, :N] - found[:, N:]) / (2 * h)


def check(run, output=minus_loss, **options):
    found, expected = ja.unroll(run, output, QUERIES, **options), differences(run, output)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())
    assert not found[:, N - 1].any() and np.abs(found[:, : N - 1]).min() > 0
    return found


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD,
        optax.sgd(optax.linear_schedule(0.3, 0.1, STEPS), momentum=0.9, nesterov=True),
        optax.adam(0.05, eps_root=1e-6),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05, eps_root=1e-6)),
    ],
    ids=["sgd", "momentum", "adam", "clipped adamw"],
)
def test_scores_are_the_derivative_of_retraining(optimizer):
    check(run_of(optimizer))


def test_scores_of_a_margin():
    check(run_of(SGD), models.margin)


def test_one_step_is_tracin_times_the_learning_rate_over_the_batch():
    """So signs agree: with minus a loss as the output, and TracIn of that loss."""
    batches = np.arange(N)[None]
    index = ja.build_index(ja.tracin(models.loss), START, TRAIN)
    # The gradient of the query is that after the step: a small one.
    found = ja.unroll(run_of(optax.sgd(1e-6), batches=batches), minus_loss, QUERIES)
    np.testing.assert_allclose(found, 1e-6 / N * np.asarray(ja.score(index, QUERIES)), rtol=1e-4)


def test_batch_norm_in_evaluation_mode_within_scan_and_remat():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
            return nn.Dense(models.CLASSES)(nn.tanh(x))

    net = Net()
    variables = jax.jit(net.init)(KEY, TRAIN["x"])
    statistics = jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])

    def apply(params, x):
        return net.apply({"params": params, "batch_stats": statistics}, x)

    @jax.checkpoint
    def one(params, example):
        return optax.softmax_cross_entropy_with_integer_labels(
            apply(params, example["x"]), example["y"]
        )

    def losses(params, batch):
        return jax.lax.scan(lambda _, example: ((), one(params, example)), (), batch)[1]

    def output(params, example, key):
        return -one(params, example)

    start = jax.tree.map(lambda x: x.astype(jnp.float64), variables["params"])
    check(run_of(optax.sgd(0.2, momentum=0.9), losses, start), output)


def test_a_state_with_running_averages_counters_and_keys():
    """Averages are differentiated too; whole numbers and keys are not."""

    def step(state, batch, weights):
        key, here = jax.random.split(state["key"])
        noisy = batch | {"x": batch["x"] + 0.1 * jax.random.normal(here, batch["x"].shape)}

        def loss(params):
            each = jax.vmap(models.loss, (None, 0, None))(params, noisy, KEY)
            return (weights * each).sum() / (1 + state["count"])

        params = jax.tree.map(
            lambda p, g: p - 0.3 * g, state["params"], jax.grad(loss)(state["params"])
        )
        average = jax.tree.map(lambda a, p: 0.7 * a + 0.3 * p, state["average"], params)
        return {"params": params, "average": average, "count": state["count"] + 1, "key": key}

    start = {"params": START, "average": START, "count": 0, "key": KEY}
    run = ja.TrainingRun(step, start, IDS, TRAIN, params=lambda state: state["average"])
    check(run)


def test_groups_of_queries_and_what_is_stored_do_not_matter():
    run = run_of(optax.adam(0.05, eps_root=1e-6))
    expected = ja.unroll(run, minus_loss, QUERIES)
    for options in ({"at_once": 1}, {"at_once": 2, "stored": 2}, {"stored": 3}, {"stored": 99}):
        found = ja.unroll(run, minus_loss, QUERIES, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("steps", "stored", "states"), [(64, 2, 12), (64, 8, 16), (64, None, 16)])
def test_few_states_are_kept_and_little_is_made_anew(steps, stored, states, monkeypatch):
    made, kept = [], {}
    advanced, segments = backward._advanced, backward._segments

    def advancing(run, state, first, last):
        made.append(last - first)
        return advanced(run, state, first, last)

    def cutting(run, whole, stored):
        found = segments(run, whole, stored)
        kept[whole.last - whole.first] = len(found)  # of stretches of one length one at a time
        return found

    monkeypatch.setattr(backward, "_advanced", advancing)
    monkeypatch.setattr(backward, "_segments", cutting)
    run = run_of(SGD, batches=np.resize(IDS, (steps, BATCH)))
    ja.unroll(run, minus_loss, QUERIES, stored=stored)
    assert sum(kept.values()) == states
    assert steps < sum(made) <= steps * len(kept)


def test_an_example_of_several_batches_has_the_sum_over_them():
    """Against runs in which its occurrences are examples of their own."""
    occurrences = {number: np.argwhere(IDS == number) for number in range(N - 1)}
    assert max(map(len, occurrences.values())) > 3
    apart = jax.tree.map(lambda x: x[np.concatenate([IDS.ravel(), [N - 1]])], TRAIN)
    ids = np.arange(IDS.size).reshape(IDS.shape)
    run = run_of(SGD)
    single = ja.TrainingRun(run.step, run.start, ids, apart, params=run.params)
    each = ja.unroll(single, minus_loss, QUERIES)
    found = ja.unroll(run, minus_loss, QUERIES)
    for number, rows in occurrences.items():
        expected = sum(each[:, ids[row, column]] for row, column in rows)
        np.testing.assert_allclose(found[:, number], expected, rtol=1e-10)


def test_batches_may_be_pairs_and_differ_in_size():
    ids = [IDS[0], IDS[1, :2], IDS[2]]
    pairs = [(jax.tree.map(lambda x, i=i: np.asarray(x)[i], TRAIN), i) for i in ids]
    run = run_of(SGD, batches=ids)
    other = ja.TrainingRun(run.step, run.start, pairs, examples=N, params=run.params)
    expected = ja.unroll(run, minus_loss, QUERIES)
    np.testing.assert_allclose(ja.unroll(other, minus_loss, QUERIES), expected, rtol=1e-12)
    np.testing.assert_allclose(expected, differences(run), rtol=1e-6, atol=1e-9)


def test_the_run_of_a_trainer_is_its_training():
    def noisy(params, example, key):
        return models.loss(params, example | {"x": example["x"] + jax.random.normal(key)}, key)

    fit = ja.trainer(
        noisy, models.mlp_params, TRAIN, optimizer=lambda steps: optax.adam(0.05, eps_root=1e-6),
        batch_size=2, epochs=2, exclude="layer0/bias",
    )  # fmt: skip
    ids = jnp.asarray([5, 1, 2, 0, 3])
    run = fit.run(KEY, ids)
    assert len(run) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        run.params(run.trained()), fit(KEY, ids),
    )  # fmt: skip
    found, expected = ja.unroll(run, minus_loss, QUERIES), differences(run)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert not found[:, [4, 6]].any() and found[:, ids].any(axis=0).all()
    whole = fit.run(KEY)
    seen = np.concatenate([whole.given(number)[1] for number in range(len(whole))])
    assert whole.size == N and np.bincount(seen).tolist().count(2) >= 5


def test_weights_of_zero_and_one_are_subsets():
    run = run_of(SGD)
    masks = np.random.default_rng(1).random((2, N)) < 0.5
    together = run.trained(masks)
    for row, mask in enumerate(masks):
        state = run.start
        for ids in IDS:
            batch = jax.tree.map(lambda x, ids=ids: x[ids], TRAIN)
            state = run.step(state, batch, jnp.asarray(mask[ids], jnp.float64))
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-10), together, state
        )


def test_the_root_of_adam_at_zero_is_reported():
    """Of a parameter that has had no gradient: zero times infinity is NaN."""
    start = {"used": jnp.ones(()), "late": jnp.zeros(())}

    def losses(params, batch):
        return (params["used"] - batch["x"][:, 0] - params["late"] * (batch["y"] == 2)) ** 2

    late = int(np.flatnonzero(TRAIN["y"] == 2)[0])
    first = np.flatnonzero(np.asarray(TRAIN["y"]) != 2)[:2]
    batches = np.stack([first, first, [late, first[0]]])

    def output(params, example, key):
        return params["used"] * example["x"][0] + params["late"]

    def run(optimizer):
        return run_of(optimizer, losses, start, batches)

    with pytest.warns(
        ja.NonFiniteWarning, match=re.escape("5 of 5 queries are not finite")
    ) as said:
        found = ja.unroll(run(optax.adam(0.1)), output, QUERIES)
    assert "eps_root=1e-8" in str(said[0].message) and "step 1 of 3" in str(said[0].message)
    assert np.isfinite(found[:, late]).all() and np.isnan(found[:, first]).all()
    safe = run(optax.adam(0.1, eps_root=1e-6))
    expected = differences(safe, output, h=1e-6)
    found = ja.unroll(safe, output, QUERIES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("field", QUERIES)
def test_a_query_that_is_not_finite_is_marked(field):
    # A label out of range: the output is not a number, and its gradient finite.
    bad = QUERIES | {field: QUERIES[field].at[3].set(jnp.nan if field == "x" else 99)}
    run = run_of(SGD)
    with pytest.warns(ja.NonFiniteWarning, match="1 of 5 queries .* ids 3"):
        found = ja.unroll(run, minus_loss, bad, at_once=2)
    assert np.isnan(found[3]).all()
    expected = np.delete(ja.unroll(run, minus_loss, QUERIES), 3, axis=0)
    np.testing.assert_allclose(np.delete(found, 3, axis=0), expected, rtol=1e-10)


def test_a_run_that_diverges_is_refused():
    run = run_of(
        SGD, lambda params, batch: batch["x"][:, 0] * jnp.inf * params["layer0"]["bias"][0]
    )
    with pytest.raises(ValueError, match="training diverged"):
        ja.unroll(run, minus_loss, QUERIES)


def test_weights_that_are_read_and_have_no_derivative_are_named():
    losses = lambda params, batch: batch["x"] @ params["layer0"]["kernel"][:, 0]  # noqa: E731
    step = step_of(SGD, losses)
    run = ja.TrainingRun(
        lambda state, batch, weights: step(state, batch, jnp.sign(weights)), run_of(SGD).start, IDS,
        TRAIN, params=lambda state: state[0],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="Every score is zero"):
        ja.unroll(run, minus_loss, QUERIES)


def loops(state, batch, weights):
    def body(state):
        return state + (weights * batch["x"][:, 0]).sum()

    return jax.lax.while_loop(lambda state: state < 10, body, state)


BAD = [
    ({"batches": IDS + 2}, ValueError, "batch 0 must be integers [b] from 0 to 6"),
    ({"batches": IDS - 1}, ValueError, "from -1 to"),
    ({"batches": IDS * 1.0}, ValueError, "got float64 [3]"),
    ({"batches": IDS[:0]}, ValueError, "batches is empty"),
    ({"batches": iter(IDS)}, TypeError, "pass list(batches)"),
    ({"batches": [IDS[0]], "train": None, "examples": N}, TypeError, "must be a pair"),
    ({"train": None}, ValueError, "examples= is needed"),
    ({"examples": N + 1}, ValueError, "examples is 8, and train has 7"),
    ({"step": lambda state, batch: state}, TypeError, "is called as (state, batch, weights)"),
    ({"step": lambda s, b, w: s + b["x"].sum()}, ValueError, "step ignores its weights"),
    ({"step": lambda s, b, w: (s, w)}, ValueError, "it differs"),
    ({"step": lambda s, b, w: jnp.full(3, w.sum())}, ValueError, "float64[3] instead of float64[]"),
    ({"step": lambda s, b, w: float(s) * w.sum()}, ValueError, "must be JAX alone"),
    ({"step": loops}, ValueError, "Loops must be jax.lax.scan"),
]


@pytest.mark.parametrize(("changed", "kind", "says"), BAD, ids=[says for _, _, says in BAD])
def test_what_is_no_run_is_refused(changed, kind, says):
    step = lambda state, batch, weights: state + weights.sum()  # noqa: E731
    good = {"step": step, "start": 0.5, "batches": IDS, "train": TRAIN}
    ja.TrainingRun(**good)
    with pytest.raises(kind, match=re.escape(says)):
        ja.TrainingRun(**good | changed)


def test_what_cannot_be_unrolled_is_refused():
    run = run_of(SGD)
    with pytest.raises(TypeError, match="run must be a training run"):
        ja.unroll(run.step, minus_loss, QUERIES)
    with pytest.raises(ValueError, match="one float scalar"):
        ja.unroll(
            run, lambda params, example, key: example["x"] @ params["layer0"]["kernel"], QUERIES
        )
    with pytest.raises(ValueError, match="stored must be at least 2"):
        ja.unroll(run, minus_loss, QUERIES, stored=1)
    with pytest.raises(ValueError, match="one for each of 7 training examples"):
        run.trained(np.ones(N + 1))
    fit = ja.trainer(models.loss, START, TRAIN, optimizer=SGD, batch_size=2, epochs=1)
    with pytest.raises(ValueError, match="ids must be integers"):
        fit.run(KEY, [0, N])


def test_a_step_is_compiled_once():
    run = run_of(SGD)
    ja.unroll(run, minus_loss, QUERIES)
    with models.compilations() as count:
        ja.unroll(run, minus_loss, QUERIES, stored=2)
        assert count() <= 1  # the gradient of the output


def test_it_is_cited():
    assert re.findall(r"@\w+{(\w+),", ja.citation(ja.unroll)) == [
        "ilyas2025magic", "engstrom2025optimizing", "li2026learning"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
def test_weights_fitted_to_a_reference_are_those_that_made_it():
    def output(params, example, key):
        return sum(params[name] @ example[name] for name in params)

    def data(n, seed):
        return {f"g{i}": np.random.default_rng([seed, i]).normal(size=(n, 5)) for i in range(5)}

    train, queries = data(80, 0), data(13, 1)
    index = ja.build_index(ja.tracin(output), {name: jnp.zeros(5) for name in train}, train)
    parts = np.asarray(ja.contributions(index, queries))
    true = np.array([0.5, 0.8, 1.0, 1.2, 2.0])
    reference = parts @ true
    reference[3, 5] = np.nan
    same = outcomes_of_scores(np.full((2, 100), 0.1), 100).outputs  # sums of 50 ones differ in bits
    assert (np.ptp(same, axis=0) == 0).all()
    fit = ja.learn_weights(index, queries, reference=reference)
    found = np.array([fit.weights[name] for name in index.layout.names])
    # Not quite: of halves ranks alone are compared, and the pull to uniform weights remains.
    np.testing.assert_allclose(found / found.mean(), true / true.mean(), rtol=0.1)
    assert fit.gain.low > 0 and fit.gain.skipped == 1
    kept = np.arange(13) != 3

    def least(scores):
        return min(
            np.corrcoef(*each)[0, 1] for each in zip(scores[kept], reference[kept], strict=True)
        )

    assert least(np.asarray(ja.score(index, queries, weights=fit))) > 0.995
    assert least(parts.sum(axis=2)) < 0.95


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        (np.zeros((5, N + 1)), {}, "reference must be scores [q, n] with n = 7"),
        (np.zeros((4, N)), {}, "Outcomes are of 4 queries"),
        (np.zeros((5, N)), {"outcomes": ja.Outcomes(np.eye(8, N) > 0, np.eye(8))}, "leave one out"),
        (np.zeros((5, N)), {"l2": 1.0}, "l2 belong to the objective without outcomes"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference, options, message):
    index = ja.build_index(ja.tracin(models.loss), START, TRAIN)
    with pytest.raises(ValueError, match=re.escape(message)):
        ja.learn_weights(index, QUERIES, reference=reference, **options)
