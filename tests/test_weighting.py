import dataclasses
import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jaxattr as ja
from jaxattr.weights import learning, shortlists
from jaxattr.weights.optimising import loss_of_list
from jaxattr.weights.report import WeightWarning
from tests import models

TRAIN, QUERIES = models.data(40), models.data(12, seed=1)
NAMES = ("a", "b", "c")
QUIET = pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")


@pytest.fixture(scope="module")
def index():
    checkpoints = [models.mlp_params(), models.mlp_params(jax.random.key(1))]
    return ja.build_index(ja.trak(models.margin), checkpoints, TRAIN, groups=ja.by_leaf)


def random_contributions(q=4, n=30, m=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(q, n, m)))


def products(params, example, key):
    return sum(params[name] @ example[name] for name in params)


def learned(parts, **options):
    """A fit on an index and queries whose contributions are these: a query is its number."""
    q, _, m = parts.shape
    names = [f"{j}" for j in range(m)]
    train = {name: parts[..., j].T for j, name in enumerate(names)}
    params, queries = ({name: x for name in names} for x in (jnp.zeros(q), jnp.eye(q)))
    method = ja.tracin(products, projection=ja.projections.identity())
    index = ja.build_index(method, params, train, groups=ja.by_leaf)
    return ja.learn_weights(index, queries, **options)


@functools.partial(jax.jit, static_argnums=(2, 3))
def loss_and_whether_certain(parts, w, top_k, squared):
    return loss_of_list(shortlists.everything(parts, w), w, top_k, squared)


def loss_of(parts, w, top_k=5, squared=False):
    loss, certain = loss_and_whether_certain(parts, w, top_k, squared)
    chex.assert_trees_all_equal(certain, True)
    return loss


@pytest.mark.parametrize("squared", [False, True])
def test_loss_by_hand(squared):
    parts, w = random_contributions(), jnp.array([0.3, 1.0, 2.0])
    expected = []
    for s in np.asarray(parts @ w):
        ordered = np.sort(np.abs(s) if squared else s)
        expected.append(-ordered[-5:].mean() / np.linalg.norm(s))
    loss = loss_of(parts, w, squared=squared)
    assert loss == pytest.approx(np.mean(expected)) and -1 / np.sqrt(5) <= loss <= 0
    assert loss_of(parts, 7 * w, squared=squared) == pytest.approx(float(loss), abs=1e-12)

    step = 1e-6 * jnp.eye(3)
    differences = [
        (loss_of(parts, w + h, squared=squared) - loss_of(parts, w - h, squared=squared)) / 2e-6
        for h in step
    ]
    gradient = jax.grad(lambda w: loss_and_whether_certain(parts, w, 5, squared)[0])(w)
    np.testing.assert_allclose(gradient, differences, rtol=1e-6)


def test_queries_without_any_score_do_no_harm():
    parts, w = random_contributions().at[1].set(0), jnp.ones(3)

    def of_list(w):
        return loss_of_list(shortlists.everything(parts, w), w, 5, False)[0]

    loss, gradient = jax.value_and_grad(of_list)(w)
    assert jnp.isfinite(loss) and jnp.isfinite(gradient).all()
    expected = loss_of(parts[jnp.array([0, 2, 3])], w) * 3 / 4
    assert loss == pytest.approx(float(expected))


@QUIET
def test_the_same_weights_with_and_without_contributions(index, monkeypatch):
    whole = ja.learn_weights(index, QUERIES, steps=30)
    for name in ("_WHOLE_BYTES", "_SHORTEST", "_PER_TOP"):
        monkeypatch.setattr(learning, name, 0)
    streamed = ja.learn_weights(index, QUERIES, steps=30)
    chex.assert_trees_all_close(streamed.weights, whole.weights, rtol=1e-6)
    np.testing.assert_allclose(streamed.losses, whole.losses, rtol=1e-6)
    assert whole.passes == 1 < streamed.passes


@QUIET
def test_an_example_that_is_not_finite_is_not_above_opponents():
    # It has no contributions, and so a score above those of many examples.
    bad = dict(TRAIN, x=TRAIN["x"].at[39].set(jnp.nan))
    others = jax.tree.map(lambda x: x[:39], TRAIN)
    with pytest.warns(ja.NonFiniteWarning, match="ids 39"):
        indexes = [
            ja.build_index(ja.tracin(models.loss), models.mlp_params(), data)
            for data in (others, bad)
        ]
    options = dict(top_k=30, l2=0.0, held_out=0.0, steps=40)
    expected, found = (ja.learn_weights(each, QUERIES, **options) for each in indexes)
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], weight, rtol=1e-9)


def test_one_step_by_hand():
    parts = random_contributions(q=6)
    fit = learned(parts, optimizer=optax.sgd(2.0), steps=1, held_out=0, l2=0.0)

    def loss(theta):
        w = jax.nn.softmax(theta)
        return loss_and_whether_certain(parts, w, 20, False)[0]

    start = jnp.zeros(3)
    theta = start - 2.0 * jax.grad(loss)(start) / jnp.abs(loss(start))
    np.testing.assert_allclose(list(fit.weights.values()), 3 * jax.nn.softmax(theta), rtol=1e-5)
    assert fit.loss == pytest.approx((float(loss(start)), float(loss(theta))), rel=1e-5)
    assert fit.held_out_loss is None and fit.losses.shape == (1,)


@QUIET
def test_the_start_is_unit_rms_and_l2_pulls_to_it():
    parts = random_contributions() * jnp.array([[[1.0, 10.0, 100.0]]])
    rms = np.sqrt((np.asarray(parts) ** 2).mean(axis=(0, 1)))
    free, held = (
        learned(parts, l2=l2, held_out=0, steps=100, start="unit_rms") for l2 in (0.0, 1e4)
    )
    gauge = (1 / rms) / (1 / rms).mean()
    np.testing.assert_allclose(list(held.weights.values()), gauge, rtol=1e-3)
    assert min(held.start_shares.values()) == pytest.approx(1 / 3)
    assert max(held.shares.values()) == pytest.approx(1 / 3, rel=1e-3)
    assert held.entropy == pytest.approx(1, rel=1e-5) and free.entropy < 0.999
    assert free.loss[1] < held.loss[1]
    assert "held out" not in str(free) and "entropy" in str(free)


@QUIET
def test_scale_of_the_groups_and_order_of_queries_do_not_matter():
    parts = random_contributions(q=8)
    options = {"held_out": 0, "steps": 50, "start": "unit_rms"}
    fit = learned(parts, **options)
    scaled = learned(parts * jnp.array([[[1.0, 10.0, 0.1]]]), **options)
    chex.assert_trees_all_close(scaled.shares, fit.shares, rtol=1e-5)
    turned = learned(parts[::-1], **options)
    chex.assert_trees_all_close(turned.weights, fit.weights, rtol=1e-5)


def planted(seed, adversary=None, q=40, n=1000):
    """Eight noisy readings of a sparse truth, and a group of pure heavy-tailed noise."""
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random((q, n)) < 0.01, rng.standard_t(3, size=(q, n)) * 5, 0)
    deviations = np.geomspace(0.5, 10, 8)
    parts = truth[..., None] + deviations * rng.normal(size=(q, n, 8))
    if adversary is not None:
        parts = np.concatenate([parts, rng.standard_t(adversary, size=(q, n, 1))], axis=2)
    return truth, jnp.asarray(parts)


def correlation(truth, parts, weights):
    scores = np.asarray(parts) @ np.array(list(weights.values()))
    return np.mean([stats.pearsonr(a, b).statistic for a, b in zip(truth, scores, strict=True)])


def test_planted_influence_is_found():
    _, given = planted(0)
    truth, parts = planted(1)
    fit = learned(given, top_k=10, l2=0.0, steps=300)
    ones = dict.fromkeys(fit.weights, 1.0)
    oracle = dict(zip(fit.weights, 1 / np.geomspace(0.5, 10, 8) ** 2, strict=True))
    uniform, found, best = (correlation(truth, parts, w) for w in (ones, fit.weights, oracle))
    assert uniform < 0.45 and found > 0.95 * best
    assert fit.held_out_loss[1] < fit.held_out_loss[0] and not fit.warnings


def test_a_heavy_tailed_group_without_signal_is_reported():
    _, parts = planted(0, adversary=1.5)
    with pytest.warns(WeightWarning, match="collapse: group '8' went from"):
        fit = learned(parts, top_k=10, l2=0.0)
    assert fit.largest == "8" and fit.tail_ratio["8"] == max(fit.tail_ratio.values())
    assert "warning: collapse" in str(fit)


def test_a_hub_is_reported():
    parts = random_contributions(q=20, n=200)
    with pytest.warns(WeightWarning, match="hub: training example 17 is among the top 10 of"):
        fit = learned(parts.at[:, 17].add(10), top_k=10, l2=1.0)
    assert fit.hub == 17 and fit.hub_share == 1


def test_over_fitting_is_reported():
    parts = random_contributions(q=5, n=30, m=20)
    with pytest.warns(WeightWarning, match="over-fitting: the held-out loss rose"):
        learned(parts, l2=0.0, steps=400, top_k=1, held_out=0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be between 1 and the 40 training examples, got 0"),
        ({"top_k": 41}, "top_k must be between 1"),
        ({"l2": -1.0}, "l2 must be finite and at least 0"),
        ({"l2": np.nan}, "l2 must be finite"),
        ({"start": "zero"}, 'start must be "unit_rms" or "uniform"'),
        ({"top_k": 5.0}, r"top_k must be a whole number, an int, got 5\.0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 30.0}, r"steps must be a whole number, an int, got 30\.0"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1"),
    ],
)
def test_bad_options(index, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ja.learn_weights(index, QUERIES, **options)


@pytest.mark.filterwarnings("ignore:The features of the first")
def test_bad_contributions():
    with pytest.raises(ValueError, match="Every contribution is zero"):
        learned(jnp.zeros((4, 20, 3)))


def programs_of(script):
    """How many programs `count(function)` finds at each call, in a process that has none yet.

    Those that a cache on disk holds count too: what is counted is what a compiler was asked for.
    """
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import jax, jax.numpy as jnp, numpy as np, optax\n"
        "import jaxattr as ja\n"
        "from tests import models\n"
        "def count(function, *arguments, **options):\n"
        "    with models.compilations() as found:\n"
        "        function(*arguments, **options)\n"
        "    print(found())\n" + script
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


@QUIET
def test_a_method_takes_forty_programs_and_another_checkpoint_none():
    first, again = programs_of(
        "train, queries = models.data(400), models.data(12, seed=1)\n"
        "def attribute(parameters):\n"
        "    index = ja.build_index(ja.logra(models.loss, rank=3), parameters, train)\n"
        "    fit = ja.learn_weights(index, queries)\n"
        "    ja.top_k(index, queries, k=4, weights=fit)\n"
        "keys = jax.random.key(0), jax.random.key(1)\n"
        "both = [models.mlp_params(key, dtype='float32') for key in keys]\n"
        "count(attribute, both[0]), count(attribute, both[1])\n"
    )
    assert first <= 40 and again == 0


@QUIET
def test_fits_share_their_programs():
    whole, *again = programs_of(
        "from jaxattr.weights import learning\n"
        "parameters = models.mlp_params(dtype='float32')\n"
        "train, queries = models.data(400), models.data(12, seed=1)\n"
        "index = ja.build_index(ja.trak(models.margin), parameters, train, groups=ja.by_leaf)\n"
        "optimizer = optax.sgd(0.1)\n"
        "def learn(queries, **options):\n"
        "    features = ja.query_features(index, queries)\n"
        "    count(ja.learn_weights, index, features, **options)\n"
        "def both():\n"
        "    learn(queries), learn(queries), learn(models.data(12, seed=2), l2=0.5)\n"
        "    learn(queries, key=jax.random.key(3)), learn(queries, start='unit_rms')\n"
        "both()\n"
        "learn(queries, optimizer=optimizer), learn(queries, optimizer=optimizer)\n"
        "learning._WHOLE_BYTES = 0\n"
        "both()\n"
    )
    assert 0 < whole <= 10 and again[:4] == [0, 0, 0, 0]
    assert again[4:6] == [2, 0]  # another optimizer is another loop
    assert 0 < again[6] <= 10 and again[7:] == [0, 0, 0, 0]


def with_copies(generator, copies, n=1000):
    """Examples of 12 features, some of them many times over, in any order."""
    x = generator.normal(size=(n, 12))
    for count in copies:
        rows = generator.choice(len(x), count, replace=False)
        x[rows] = 3 * x[rows[0]]
    return {"x": x}


def bilinear(params, example, key):
    parts = zip(params.values(), jnp.split(example["x"], 3), strict=True)
    return sum(jnp.sum(p * x) for p, x in parts)


def fits_of_copies(monkeypatch, copies, mesh, seed=0, n=1000, near=4, squared=False, **options):
    """Weights learned without the array of contributions, which are those learned with it.

    Some of twelve queries are near the strongest example.
    """
    generator = np.random.default_rng(seed)
    train = with_copies(generator, copies, n)
    strongest = train["x"][np.square(train["x"]).sum(axis=1).argmax()]
    queries = generator.normal(size=(12, 12))
    queries[:near] = strongest + 0.3 * queries[:near]
    queries = {"x": queries}
    params = {name: jnp.ones(4) for name in NAMES}
    mesh = None if mesh is None else jax.make_mesh((mesh,), ("data",))
    method = dataclasses.replace(ja.tracin(bilinear), link="square" if squared else "identity")
    index = ja.build_index(method, params, train, groups=ja.by_leaf, batch_size=64, mesh=mesh)
    whole = ja.learn_weights(index, queries, **options)
    with monkeypatch.context() as patch:
        patch.setattr(learning, "_WHOLE_BYTES", 0)
        streamed = ja.learn_weights(index, queries, **options)
    np.testing.assert_allclose(streamed.losses, whole.losses, rtol=1e-9)
    assert streamed.loss == pytest.approx(whole.loss, rel=1e-9)
    assert streamed.weights == pytest.approx(whole.weights, rel=1e-9)
    assert (streamed.hub, streamed.hub_share) == (whole.hub, whole.hub_share)
    return streamed


@QUIET
def test_a_page_that_a_crawl_holds_600_times_costs_no_passes(monkeypatch):
    streamed = fits_of_copies(monkeypatch, (600,), None, n=4000)
    assert streamed.passes <= 5


def short_lists(monkeypatch):
    """Lists of 64 and slabs of 128."""
    monkeypatch.setattr("jaxattr.weights.learning._SHORTEST", 64)
    monkeypatch.setattr("jaxattr.weights.learning.SLAB", 128)


@QUIET
@pytest.mark.parametrize(
    ("copies", "mesh", "squared"),
    [((150, 90, 40), None, False), ((150, 90), 8, True), ((900,), None, False)],
)
def test_copies_of_strong_examples_cost_no_passes(monkeypatch, copies, mesh, squared):
    """Up to 900 copies on short lists; as with all contributions."""
    short_lists(monkeypatch)
    streamed = fits_of_copies(monkeypatch, copies, mesh, squared=squared, steps=40, top_k=5)
    assert streamed.passes <= 12


@QUIET
@pytest.mark.parametrize(
    ("seed", "mesh", "squared"), [(1, None, False), (2, 8, True), (3, None, True)]
)
def test_any_copies_leave_the_weights_as_they_are(monkeypatch, seed, mesh, squared):
    short_lists(monkeypatch)
    generator = np.random.default_rng(seed)
    copies = generator.integers(2, 200, size=generator.integers(2, 6))
    options = {"steps": 20, "top_k": int(generator.integers(1, 9))}
    fits_of_copies(monkeypatch, copies, mesh, seed, squared=squared, **options)


@QUIET
def test_of_copies_that_are_a_hub_the_first_is_named(monkeypatch):
    fit = fits_of_copies(monkeypatch, (200,), 8, near=12, steps=5, top_k=5)
    train = with_copies(np.random.default_rng(0), (200,))["x"]
    assert fit.hub == np.square(train).sum(axis=1).argmax() and fit.hub_share == 1


@QUIET
def test_examples_that_only_share_a_digest_are_no_copies(monkeypatch):
    short_lists(monkeypatch)
    monkeypatch.setattr(
        "jaxattr.weights.shortlists._digests",
        lambda place, side: jnp.ones((len(side.counted), 2), jnp.uint32),
    )
    shortlists.compiled_pass.cache_clear()
    fits_of_copies(monkeypatch, (150, 90), 8, steps=40, top_k=5)
    shortlists.compiled_pass.cache_clear()
